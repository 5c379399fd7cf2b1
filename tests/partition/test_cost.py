"""Times against figures worked out by hand: bytes over bandwidth, operations over rate."""

from dataclasses import replace
from pathlib import Path

import pytest

from dist_int8.models import describe, load_config
from dist_int8.partition import PROFILES, Formats
from dist_int8.partition.cost import PS_PER_S, block_ps, head_ps, hop_ps

MODELS = Path(__file__).parents[2] / "configs" / "models"
BLOOM = describe(load_config(MODELS / "bloom-176b"))
INT8 = Formats(int8=True, float_size=2, vocab_size=2)
SIXTEEN_BITS = Formats(int8=False, float_size=2, vocab_size=2)
A100 = replace(PROFILES["a100-80"], block_overhead_s=0.0)
WEIGHTS = 2_466_250_752  # of the linears of a block, 12 * 14336**2


def seconds(formats, profile, rows, context=0, sequences=1):
    block = BLOOM.blocks[0]
    return (
        block_ps(
            block,
            formats,
            profile,
            num_rows=rows,
            num_sequences=sequences,
            context=context,
        )
        / PS_PER_S
    )


def test_one_row_is_bound_by_memory_bandwidth():
    # 2.47e9 bytes at 86% of 2,039 GB/s
    assert seconds(INT8, A100, 1) == pytest.approx(WEIGHTS / (0.86 * 2039e9), rel=1e-3)
    assert seconds(INT8, A100, 32) == seconds(INT8, A100, 1)  # below the knee rows are free
    assert seconds(SIXTEEN_BITS, A100, 1) == pytest.approx(2 * seconds(INT8, A100, 1), rel=1e-3)


def test_many_rows_are_bound_by_compute():
    # 512 rows at 70% of 624 TOPS
    expected = 2 * 512 * WEIGHTS / (0.7 * 624e12)
    assert seconds(INT8, A100, 512) == pytest.approx(expected, rel=1e-6)
    assert seconds(SIXTEEN_BITS, A100, 512) == pytest.approx(2 * expected, rel=1e-6)


def test_cpu_time_is_reading_plus_computing():
    one_after_the_other = replace(A100, overlaps=False)
    reading, computing = WEIGHTS / A100.int8_bandwidth, 2 * 512 * WEIGHTS / A100.int8_ops
    found = seconds(INT8, one_after_the_other, 512)
    assert found == pytest.approx(reading + computing, rel=1e-3)


def test_every_sequence_reads_its_own_keys_and_values():
    more = seconds(INT8, A100, 8, context=2048, sequences=8) - seconds(INT8, A100, 8)
    assert more == pytest.approx(8 * 2048 * 57_344 / A100.float_bandwidth, rel=1e-6)


def test_times_of_head_and_hop():
    head = head_ps(BLOOM, INT8, A100, num_rows=1) / PS_PER_S
    assert head == pytest.approx(7_193_231_360 / A100.float_bandwidth, rel=1e-6)
    int8 = head_ps(BLOOM, replace(INT8, head_int8=True), A100, num_rows=1) / PS_PER_S
    assert int8 == pytest.approx(3_597_619_200 / A100.int8_bandwidth, rel=1e-6)
    here = hop_ps(BLOOM, INT8, A100, num_rows=32, same_host=True) / PS_PER_S
    there = hop_ps(BLOOM, INT8, A100, num_rows=32, same_host=False) / PS_PER_S
    assert here == pytest.approx(15e-6 + 32 * 28_672 / (0.86 * 300e9), rel=1e-4)
    assert there == pytest.approx(40e-6 + 32 * 28_672 / 12.5e9, rel=1e-4)
