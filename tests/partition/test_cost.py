"""Times against figures worked out by hand: bytes over bandwidth, operations over rate."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dist_int8.models import describe, load_config
from dist_int8.partition import PROFILES, Formats
from dist_int8.partition.cost import (
    DECODE_KERNELS,
    HEAD_KERNELS,
    PREFILL_KERNELS,
    PS_PER_S,
    StepShape,
    block_ps,
    head_ps,
    hop_ps,
)

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "configs" / "models"
LAUNCHES = ROOT / "benchmarks" / "results" / "launches.json"
BLOOM = describe(load_config(MODELS / "bloom-176b"))
INT8 = Formats(int8=True, float_size=2, vocab_size=2)
SIXTEEN_BITS = Formats(int8=False, float_size=2, vocab_size=2)
A100 = replace(PROFILES["a100-80"], block_overhead_s=0.0, launch_s=0.0)
WEIGHTS = 2_466_250_752  # of the linears of a block, 12 * 14336**2


def seconds(formats, profile, rows, context=0, sequences=1, is_recorded=False):
    step = StepShape(rows, sequences, context, is_recorded)
    return block_ps(BLOOM.blocks[0], formats, profile, step) / PS_PER_S


# Features that are quantized in a block: three times 14,336 and 57,344; and those of its results.
INPUTS, OUTPUTS = 6 * 14_336 + 14_336, 9 * 14_336
QUANTIZING = INPUTS * 400e-12


def test_one_row_is_bound_by_memory_bandwidth():
    # 2.47e9 bytes at 86% of 2,039 GB/s
    reading = WEIGHTS / (0.86 * 2039e9)
    assert seconds(INT8, A100, 1) == pytest.approx(reading + QUANTIZING, rel=1e-3)
    assert seconds(INT8, A100, 32) == seconds(INT8, A100, 1)  # below the knee rows are free
    assert seconds(SIXTEEN_BITS, A100, 1) == pytest.approx(2 * reading, rel=1e-3)


def test_many_rows_are_bound_by_compute():
    # 512 rows at 70% of 624 TOPS; 3 bytes per feature that is quantized, 8 per int32 sum
    computing = 2 * 512 * WEIGHTS / (0.7 * 624e12)
    converting = 512 * (3 * INPUTS + 8 * OUTPUTS) / (0.86 * 2039e9)
    assert seconds(INT8, A100, 512) == pytest.approx(computing + converting, rel=1e-6)
    assert seconds(SIXTEEN_BITS, A100, 512) == pytest.approx(2 * computing, rel=1e-6)


def test_attention_over_a_long_prompt_has_a_rate_of_its_own():
    h100 = replace(PROFILES["h100"], block_overhead_s=0.0, launch_s=0.0)
    more = seconds(INT8, h100, 512, context=2048) - seconds(INT8, h100, 512)
    assert more == pytest.approx(4 * 512 * 2048 * 14_336 / (0.35 * 989e12), rel=1e-6)


def test_a_host_that_launches_kernel_by_kernel_is_the_bound_of_small_steps():
    slow = replace(A100, launch_s=1e-3)
    assert seconds(INT8, slow, 1) == pytest.approx(DECODE_KERNELS * 1e-3)
    assert seconds(INT8, slow, 64) == pytest.approx(PREFILL_KERNELS * 1e-3)
    assert seconds(INT8, slow, 1, is_recorded=True) == seconds(INT8, A100, 1)
    cpu = PROFILES["cpu"]
    assert seconds(INT8, cpu, 1) == seconds(INT8, cpu, 1, is_recorded=True)


def test_what_is_not_of_blocks_is_launched_with_the_head():
    slow = replace(A100, launch_s=1e-3)
    assert head_ps(BLOOM, INT8, slow, num_rows=1) == HEAD_KERNELS * PS_PER_S // 1000
    recorded = head_ps(BLOOM, INT8, slow, num_rows=1, is_recorded=True)
    assert recorded == head_ps(BLOOM, INT8, A100, num_rows=1)


def test_kernels_of_a_block_are_those_that_were_counted():
    counted = json.loads(LAUNCHES.read_text())["models"]
    for steps in counted.values():
        for step, counts in steps.items():
            if step.startswith("decode") and not step.endswith("replayed"):
                assert counts["per_block"] == DECODE_KERNELS, step
        assert steps["prefill of 4 x 512"]["per_block"] == PREFILL_KERNELS


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
