"""Plans of whole models: balanced, within budgets, refused by name, pinned, deterministic, fast."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from dist_int8.models import BlockSpec, ModelSpec, describe, load_config
from dist_int8.partition import PROFILES, CutOptions, Device, Formats, Workload, plan_stages
from dist_int8.partition.planner import can_plan

BLOOM = Path(__file__).parents[2] / "configs" / "models" / "bloom-176b"
INT8 = Formats(int8=True, float_size=4, vocab_size=2)
SIXTEEN_BITS = Formats(int8=True, float_size=2, vocab_size=2)
ONE = Workload(num_sequences=1, max_tokens=16)


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


@pytest.fixture(scope="module")
def bloom():
    return describe(load_config(BLOOM))


def cpus(count):
    return [Device("cpu", PROFILES["cpu"])] * count


def gpus(count, gigabytes=80, profile="a100-80", **more):
    return [Device(f"cuda:{i}", PROFILES[profile], gigabytes * 10**9, **more) for i in range(count)]


def counts(plan):
    return [len(stage.blocks) for stage in plan.stages]


def test_a_heavy_head_leaves_the_last_stage_fewer_blocks():
    def last_stage(vocab_size, devices):
        pure = {"block_overhead_s": 0, "link_latency_s": 0, "link_bandwidth": 1e15}
        devices = [replace(d, profile=replace(d.profile, **pure)) for d in devices]
        return counts(plan_stages(make_spec(vocab_size=vocab_size), devices, INT8, ONE))[1]

    assert last_stage(64, cpus(2)) == 3 and last_stage(600, cpus(2)) == 2


@pytest.mark.parametrize("devices", [cpus(4), gpus(4, 200)])
def test_long_prompts_give_the_stage_of_the_head_more_blocks(bloom, devices):
    workload = Workload(num_sequences=1, max_tokens=1024)

    def last_stage(ratio, objective="throughput"):
        options = CutOptions(objective, prefill_ratio=ratio)
        return counts(plan_stages(bloom, devices, INT8, workload, options))[-1]

    assert last_stage(0.0) == 16 and last_stage(1000.0) == 17
    assert last_stage(0.0, "latency") == last_stage(1000.0, "latency")


@pytest.mark.parametrize("gigabytes", [70, 80, 141])
def test_bloom_is_balanced_by_what_a_step_reads(bloom, gigabytes):
    """An fp16 head is 2.9 int8 blocks to a memory-bound device (7.19e9 / 2.47e9 bytes)."""
    plan = plan_stages(bloom, gpus(4, gigabytes), SIXTEEN_BITS, ONE)
    assert plan.fits and counts(plan) == [18, 18, 18, 16]
    # the sum of all bytes at 86% of 2,039 GB/s: 102.6 ms; per block 25 us, and quantization
    read = plan.model_bytes / (0.86 * 2039e9) * 1e3 + 70 * (0.025 + 7 * 14_336 * 400e-9)
    assert plan.ms_per_token == pytest.approx(read, rel=0.01)


def test_each_objective_is_best_at_what_it_optimizes(bloom):
    workload = Workload(num_sequences=8, max_tokens=1024)
    plans = {
        name: plan_stages(bloom, gpus(4), SIXTEEN_BITS, workload, CutOptions(name))
        for name in ("throughput", "latency", "max_kv_tokens")
    }
    slowest = {name: max(stage.ps for stage in plan.stages) for name, plan in plans.items()}
    assert slowest["throughput"] <= min(slowest.values())
    assert plans["max_kv_tokens"].kv_tokens > plans["throughput"].kv_tokens
    assert counts(plans["max_kv_tokens"]) == [17, 18, 18, 17]
    # one fast device among slow ones: latency takes it alone, as far as its memory goes
    mixed = [*gpus(1, 24, "l4"), *gpus(1, 80, "h100"), *gpus(1, 24, "l4")]
    small = replace(bloom, blocks=bloom.blocks[:20])
    alone = plan_stages(small, mixed, SIXTEEN_BITS, ONE, CutOptions("latency", choose_count=True))
    assert counts(alone) == [20] and alone.stages[0].device == "cuda:0"
    assert alone.ms_per_token < plan_stages(small, mixed, SIXTEEN_BITS, ONE).ms_per_token


def test_faster_devices_get_more_blocks(bloom):
    mixed = [*gpus(2, 80, "a100-80"), *gpus(2, 80, "h100")]
    plan = plan_stages(bloom, mixed, SIXTEEN_BITS, ONE)
    assert plan.fits and min(counts(plan)[2:]) > max(counts(plan)[:2])


def test_hop_to_another_host_costs_more(bloom):
    here = plan_stages(bloom, gpus(4), SIXTEEN_BITS, ONE)
    far = [replace(d, host=f"node-{i // 2}") for i, d in enumerate(gpus(4))]
    there = plan_stages(bloom, far, SIXTEEN_BITS, ONE)
    link, network = PROFILES["a100-80"].link_latency_s, PROFILES["a100-80"].network_latency_s
    more = there.ms_per_token - here.ms_per_token
    assert more == pytest.approx((network - link) * 1e3, rel=0.2)


def test_every_stage_stays_within_its_budget(bloom):
    workload = Workload(num_sequences=4, max_tokens=2048)
    plan = plan_stages(bloom, gpus(4, reserve=10**9), SIXTEEN_BITS, workload)
    for stage in plan.stages:
        assert stage.needed_bytes <= stage.budget and stage.free_bytes >= 0
        assert stage.reserve_bytes == 10**9 and stage.activation_bytes > 0
        assert stage.kv_bytes == 4 * 2048 * 57_344 * len(stage.blocks)
    assert plan.kv_tokens >= 4 * 2048


def test_plan_that_does_not_fit_lacks_the_fewest_bytes(bloom):
    plan = plan_stages(bloom, gpus(4, 40), SIXTEEN_BITS, ONE)
    assert not plan.fits and plan.kv_tokens == 0
    # every stage is over its budget, so no cut lacks less than all that is needed less all budgets
    assert all(stage.missing_bytes for stage in plan.stages)
    assert plan.missing_bytes == sum(stage.needed_bytes for stage in plan.stages) - 4 * 40 * 10**9
    assert plan.missing_bytes > plan.model_bytes + 7_193_231_360 - 160e9  # the head's own table
    line = plan.refusal()
    assert "stage 1 on cuda:1 must fit 37.25 GiB" in line and "too much" in line
    assert str(plan.missing_bytes) in line and "\n" not in line


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("tied_head", [True, False])
def test_one_byte_less_than_planned_does_not_fit(count, tied_head):
    """The search and the plan count the same bytes: with one byte less, it does not fit."""
    spec = make_spec(tied_head=tied_head)
    pinned = CutOptions(pinned=(6 // count,) * count)
    needed = [
        stage.needed_bytes for stage in plan_stages(spec, cpus(count), INT8, ONE, pinned).stages
    ]
    exact = [replace(d, budget=n) for d, n in zip(cpus(count), needed, strict=True)]
    for options in (pinned, CutOptions()):
        plan = plan_stages(spec, exact, INT8, ONE, options)
        assert plan.fits and plan.kv_tokens == ONE.num_tokens
        assert [stage.free_bytes for stage in plan.stages] == [0] * count
        assert can_plan(spec, exact, INT8, ONE, options)
    for short in range(count):
        less = [replace(d, budget=d.budget - (i == short)) for i, d in enumerate(exact)]
        plan = plan_stages(spec, less, INT8, ONE, pinned)
        assert plan.missing_bytes == 1 and not can_plan(spec, less, INT8, ONE, pinned)


def test_pinned_stages_are_kept_or_refused(bloom):
    pinned = CutOptions(pinned=(17, 18, 18, 17))
    assert counts(plan_stages(bloom, gpus(4), SIXTEEN_BITS, ONE, pinned)) == [17, 18, 18, 17]
    for wrong, part in (
        ((17, 18, 18, 16), "add up to the model's 70, got .* with sum 69"),
        ((17, 18, 35), r"one number of blocks per device, 4 in total, got"),
        ((0, 35, 18, 17), "above 0"),
    ):
        with pytest.raises(ValueError, match=part):
            plan_stages(bloom, gpus(4), SIXTEEN_BITS, ONE, CutOptions(pinned=wrong))


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ValueError, match="at most the model's 6 blocks, got 7; use 6 or fewer"):
        plan_stages(make_spec(), cpus(7), INT8, ONE)


def test_a_tied_head_counts_once_where_one_stage_has_both():
    one = plan_stages(make_spec(), cpus(1), INT8, ONE).stages[0]
    two = plan_stages(make_spec(), cpus(2), INT8, ONE).stages
    assert sum(stage.weight_bytes for stage in two) - one.weight_bytes == 64 * 32 * 2


@pytest.mark.parametrize("objective", ["throughput", "latency", "max_kv_tokens"])
def test_seventy_blocks_on_sixteen_mixed_devices_within_100_ms(bloom, objective):
    devices = [*gpus(8, 40, "a100-40"), *gpus(8, 80, "h100")]
    workload = Workload(num_sequences=4, max_tokens=2048)

    def seconds():
        begin = time.process_time()  # of this process: others may be busy
        plan_stages(bloom, devices, SIXTEEN_BITS, workload, CutOptions(objective))
        return time.process_time() - begin

    assert min(seconds() for _ in range(3)) < 0.1
    plans = [
        plan_stages(bloom, devices, SIXTEEN_BITS, workload, CutOptions(objective)) for _ in range(2)
    ]
    assert plans[0] == plans[1]
