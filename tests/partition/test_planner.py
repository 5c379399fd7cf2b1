"""Stages are contiguous, complete, balanced exactly, and refused by name when they do not fit."""

import itertools

import pytest

from dist_int8.models import BlockSpec, ModelSpec
from dist_int8.partition import plan_stages
from dist_int8.partition.memory import Formats
from dist_int8.partition.planner import format_bytes, split_blocks

INT8 = Formats(int8=True, float_size=4, vocab_size=4)


def make_spec(num_blocks=6, vocab_size=64, tied_head=True) -> ModelSpec:
    block = BlockSpec(
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm="rms",
        norm_eps=1e-5,
        gated=True,
    )
    return ModelSpec(
        family="llama",
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=32,
        blocks=(block,) * num_blocks,
        tied_head=tied_head,
        max_positions=128,
        embedding_size=32,
    )


def slowest_by_trying_all(costs, last_cost, num_stages):
    best = None
    for cuts in itertools.combinations(range(1, len(costs)), num_stages - 1):
        edges = [0, *cuts, len(costs)]
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
        sums[-1] += last_cost
        best = max(sums) if best is None else min(best, max(sums))
    return best


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("last_cost", [0, 7, 100])
def test_the_slowest_stage_is_the_best_of_all_splits(num_stages, last_cost):
    costs = [3, 9, 1, 4, 4, 8, 2]
    ranges = split_blocks(costs, last_cost, num_stages)
    assert [i for blocks in ranges for i in blocks] == list(range(len(costs)))
    sums = [sum(costs[i] for i in blocks) for blocks in ranges]
    sums[-1] += last_cost
    assert max(sums) == slowest_by_trying_all(costs, last_cost, num_stages)


def test_seventy_blocks_on_sixteen_stages_are_planned_at_once():
    ranges = split_blocks([1] * 70, 3, 16)
    assert max(len(blocks) for blocks in ranges) == 5 and len(ranges[-1]) <= 2


def test_a_heavy_head_leaves_the_last_stage_fewer_blocks():
    def last_stage(vocab_size, devices):
        plan = plan_stages(
            make_spec(vocab_size=vocab_size), devices, INT8, num_slots=1, max_tokens=16
        )
        return len(plan.stages[1].blocks)

    assert last_stage(64, ["cpu"] * 2) == 3 and last_stage(400, ["cpu"] * 2) == 2
    # an fp32 head is four times its weights in bytes, which is what a GPU waits for
    assert last_stage(100, ["cpu"] * 2) == 3 and last_stage(100, ["cuda:0", "cuda:1"]) == 2


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ValueError, match="at most the model's 6 blocks, got 7; use 6 or fewer"):
        plan_stages(make_spec(), ["cpu"] * 7, INT8, num_slots=1, max_tokens=16)


def test_a_stage_over_its_budget_is_named():
    with pytest.raises(ValueError, match=r"stage 1 on cuda:1 must fit 1000 B.*too much"):
        plan_stages(
            make_spec(),
            ["cuda:0", "cuda:1"],
            INT8,
            num_slots=1,
            max_tokens=16,
            budgets=[10**9, 1000],
        )


def test_a_tied_head_counts_once_where_one_stage_has_both():
    one = plan_stages(make_spec(), ["cpu"], INT8, num_slots=1, max_tokens=16).stages[0]
    two = plan_stages(make_spec(), ["cpu"] * 2, INT8, num_slots=1, max_tokens=16).stages
    assert sum(stage.weight_bytes for stage in two) - one.weight_bytes == 64 * 32 * 4


def test_the_table_names_every_stage():
    text = plan_stages(make_spec(), ["cpu"] * 2, INT8, num_slots=1, max_tokens=16).table()
    assert text.splitlines()[0].split()[:3] == ["stage", "device", "blocks"]
    assert len(text.splitlines()) == 3


def test_format_bytes():
    assert format_bytes(512) == "512 B"
    assert format_bytes(1610612736) == "1.50 GiB"
