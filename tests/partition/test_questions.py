"""Open questions get the most that fits; refusals come with suggestions that work."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dist_int8.models import describe, load_config
from dist_int8.partition import PROFILES, CutOptions, Device, Formats, Question, ask
from dist_int8.partition.questions import largest

MODELS = Path(__file__).parents[2] / "configs" / "models"
FORMATS = Formats(int8=True, float_size=2, vocab_size=2)


@pytest.fixture(scope="module")
def bloom():
    return describe(load_config(MODELS / "bloom-176b"))


def gpus(count, gigabytes, profile="a100-80"):
    reserve = 256 * 1024**2
    return [
        Device(f"cuda:{i}", PROFILES[profile], gigabytes * 10**9, reserve) for i in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "gigabytes", "fits"),
    [(4, 80, True), (3, 80, True), (5, 40, True), (8, 40, True), (8, 80, True), (4, 40, False)],
)
def test_bloom_on_the_machines_of_the_int8_blog(bloom, count, gigabytes, fits):
    plan = ask(bloom, gpus(count, gigabytes), FORMATS, Question())
    assert plan.fits == fits
    if not fits:
        assert plan.suggestions == (
            "add 1 more device like cuda:3: 5 in all",
            "give every device 47162351680 bytes (43.92 GiB)",
        )
        return
    used = plan.workload.num_tokens
    assert used <= plan.kv_tokens
    assert all(stage.free_bytes >= 0 for stage in plan.stages)


def test_open_question_gets_the_most_that_fits(bloom):
    devices = gpus(3, 80)
    plan = ask(bloom, devices, FORMATS, Question())
    most, pinned = plan.workload.num_sequences, tuple(len(s.blocks) for s in plan.stages)
    assert plan.workload.max_tokens == 2048 and most > 1

    def fits(num_sequences, max_tokens):
        question = Question(num_sequences, max_tokens, options=CutOptions(pinned=pinned))
        return ask(bloom, devices, FORMATS, question).fits

    assert fits(most, 2048) and not fits(most + 1, 2048)
    longest = ask(bloom, devices, FORMATS, Question(num_sequences=12)).workload.max_tokens
    free = Question(12, longest), Question(12, longest + 1)
    assert [ask(bloom, devices, FORMATS, q).fits for q in free] == [True, False]


@pytest.mark.parametrize("most", [1, 2, 7, 16])
def test_the_largest_number_that_fits(most):
    for limit in range(most + 2):
        assert largest(1, most, lambda n, limit=limit: n <= limit) == min(limit, most)


def test_suggestions_name_the_cheapest_changes_and_each_works(bloom):
    devices = gpus(3, 80)
    plan = ask(bloom, devices, FORMATS, Question(num_sequences=9, max_tokens=2048))
    assert not plan.fits and plan.missing_bytes > 0
    text = " | ".join(plan.suggestions)
    fewer = int(text.split("sequences from 9 to ")[1].split()[0].rstrip("|"))
    shorter = int(text.split("context from 2048 to ")[1].split()[0])
    assert ask(bloom, devices, FORMATS, Question(fewer, 2048)).fits
    assert not ask(bloom, devices, FORMATS, Question(fewer + 1, 2048)).fits
    assert ask(bloom, devices, FORMATS, Question(9, shorter)).fits
    assert "add 1 more device" in text
    assert ask(bloom, gpus(4, 80), FORMATS, Question(9, 2048)).fits


def test_an_int8_head_is_suggested_where_it_is_enough(bloom):
    devices = gpus(5, 40)
    asked = Question(num_sequences=1, max_tokens=1024)
    plan = ask(bloom, devices, FORMATS, asked)
    assert not plan.fits and any("--head int8" in change for change in plan.suggestions)
    assert ask(bloom, devices, Formats(True, 2, 2, head_int8=True), asked).fits


def test_an_int8_kv_cache_is_suggested_where_it_is_enough(bloom):
    asked = Question(num_sequences=20, max_tokens=2048)
    plan = ask(bloom, gpus(4, 80), FORMATS, asked)
    assert not plan.fits and "take an int8 KV cache (--kv int8)" in plan.suggestions
    assert ask(bloom, gpus(4, 80), replace(FORMATS, kv_int8=True), asked).fits


def test_unpinning_stages_is_suggested_if_it_helps(bloom):
    pinned = CutOptions(pinned=(1, 34, 34, 1))
    plan = ask(bloom, gpus(4, 80), FORMATS, Question(1, 128, options=pinned))
    assert not plan.fits and plan.suggestions[0].startswith("let the planner choose the stages")


@pytest.mark.parametrize(
    ("question", "part"),
    [
        (Question(num_sequences=0), "sequences must be at least 1, got 0"),
        (Question(max_tokens=-1), "context must be at least 1, got -1"),
        (Question(prefill_chunk=0), "prefill_chunk must be at least 1, got 0"),
        (Question(num_micro_batches=0), "micro_batches must be at least 1, got 0"),
    ],
)
def test_counts_below_one_are_refused(bloom, question, part):
    with pytest.raises(ValueError, match=part):
        ask(bloom, gpus(4, 80), FORMATS, question)


def test_a_context_beyond_the_positions_is_refused():
    spec = describe(load_config(MODELS / "opt-66b"))
    with pytest.raises(ValueError, match="at most the model's 2048 positions, got 4096"):
        ask(spec, gpus(2, 80), FORMATS, Question(max_tokens=4096))


@pytest.mark.parametrize("gigabytes", [(2, 8), (8, 2)])
def test_stages_that_share_a_device_keep_their_own_budgets(gigabytes):
    bloom_560m = describe(load_config(MODELS / "bloom-560m"))
    devices = [Device("cpu", PROFILES["cpu"], number * 10**9) for number in gigabytes]
    plan = ask(bloom_560m, devices, FORMATS, Question(options=CutOptions(pinned=(12, 12))))
    assert [stage.budget for stage in plan.stages] == [device.budget for device in devices]
    other = [Device(f"cuda:{i}", d.profile, d.budget) for i, d in enumerate(devices)]
    apart = ask(bloom_560m, other, FORMATS, Question(options=CutOptions(pinned=(12, 12))))
    assert plan.kv_tokens == apart.kv_tokens


def gpu(index, budget, reserve=256 * 1024**2):
    return Device(f"cuda:{index}", PROFILES["a100-80"], budget, reserve)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        # smaller than the reserve alone: no number of such devices helps
        ([gpu(0, 10**8)], r"give every device (\d+) bytes"),
        ([gpu(0, 10**10, 11 * 10**9)], r"lower the reserve from 10.24 GiB to 5.91"),
        (
            [gpu(0, 10**10), gpu(1, 10**8)],
            r"give cuda:1 (\d+) bytes instead of 100000000",
        ),
        (
            [gpu(0, 10**10), gpu(1, 10**8)],
            r"leave devices without a stage",
        ),
    ],
)
def test_suggested_budget_is_exactly_enough(devices, expected):
    model = describe(load_config(MODELS / "bloom-3b"))
    plan = ask(model, devices, FORMATS, Question())
    assert not plan.fits
    (match,) = [m for m in (re.match(expected, s) for s in plan.suggestions) if m]
    if match.groups():  # exactly enough
        for less, fits in ((0, True), (1, False)):
            budget = int(match[1]) - less
            changed = [*devices[:-1], replace(devices[-1], budget=budget)]
            assert ask(model, changed, FORMATS, Question()).fits == fits


def test_open_question_predicts_the_time_of_its_final_workload(bloom):
    devices = gpus(4, 80)
    opened = ask(bloom, devices, FORMATS, Question())
    pinned = CutOptions(pinned=tuple(len(stage.blocks) for stage in opened.stages))
    settled = opened.workload
    asked = Question(settled.num_sequences, settled.max_tokens, options=pinned)
    assert ask(bloom, devices, FORMATS, asked) == opened
    assert opened.ms_per_token > ask(bloom, devices, FORMATS, Question(1)).ms_per_token
