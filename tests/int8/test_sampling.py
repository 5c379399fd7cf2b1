"""Drawing tokens: the compiled ops against the specification, numpy's Philox and transformers."""

import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dist_int8.int8 import ops, sampling_reference
from dist_int8.int8.sampling_reference import NOT_A_TOKEN, SETTINGS

NEUTRAL = {name: 0.0 for name in SETTINGS} | {"top_p": 1.0, "repetition_penalty": 1.0}


def table(*rows):
    """float64 [S, 8] of settings by name."""
    values = [[float((NEUTRAL | row)[name]) for name in SETTINGS] for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def draw(logits, *rows, lengths=None, seed=0):
    """Row i of logits with rows[i], or every row with the only one."""
    count = len(logits)
    slots = torch.arange(count, dtype=torch.int32) if len(rows) == count else torch.zeros(count)
    lengths = torch.arange(count) if lengths is None else lengths
    seeds = torch.arange(seed, seed + len(rows))
    args = (slots.int(), lengths.int(), table(*rows), seeds)
    tokens = ops.sample_tokens(logits, *args)
    assert torch.equal(tokens, sampling_reference.sample_tokens(logits, *args))
    return tokens


def test_random_bits_are_those_of_numpys_philox():
    for seed, position in product((0, 5, 2**63 - 1, 2**64 - 1), (1, 2, 77, 2**31)):
        theirs = np.random.Philox(key=seed, counter=position - 1).random_raw()  # it counts first
        assert sampling_reference.random_bits(seed, position) == theirs


def test_the_exponential_is_within_two_ulp():
    x = torch.linspace(sampling_reference.LEAST_EXPONENT, 0, 100_003)
    exact = x.double().exp()
    error = (sampling_reference.portable_exp(x).double() - exact).abs() / exact
    assert float(error.max()) < 2 * 2**-23
    assert sampling_reference.weigh(torch.zeros(1)).item() == 2**40
    assert sampling_reference.weigh(torch.tensor([-28.5, -torch.inf])).tolist() == [0, 0]


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 1000, 20_000])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 6.0])
def test_tokens_are_those_of_the_specification(vocabulary, scale):
    generator = torch.Generator().manual_seed(vocabulary)
    rows = [
        {"temperature": temperature, "top_k": k, "top_p": top_p, "min_p": min_p}
        for temperature, k, top_p, min_p in product(
            (0, 0.01, 1, 30), (0, 1, 50, 700), (1, 0.999, 0.6, 1e-6), (0, 0.1, 1)
        )
    ]
    logits = scale * torch.randn(len(rows), vocabulary, generator=generator)
    logits[::2] = logits[::2].round(decimals=1)  # many equal ones
    logits[:, vocabulary // 2] = -torch.inf
    lengths = torch.randint(0, 10_000, (len(rows),), generator=generator)
    draw(logits, *rows, lengths=lengths, seed=2**40)


def test_greedy_takes_the_first_of_the_largest_logits():
    logits = torch.tensor([[-1.0, 3.0, 3.0], [-0.0, 0.0, -5.0], [-torch.inf] * 3])
    assert draw(logits, {}, {}, {}).tolist() == [1, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan])
def test_a_row_with_nan_has_no_token_and_leaves_the_others_alone(bad):
    logits = torch.zeros(3, 200)
    logits[0, 150] = logits[1, 3] = bad
    logits[2, 2] = 50.0
    rows = [{}, {"temperature": 1}, {"temperature": 1}]
    assert draw(logits, *rows).tolist() == [NOT_A_TOKEN, NOT_A_TOKEN, 2]


def test_an_infinite_largest_logit_is_taken_greedily_and_never_drawn():
    logits = torch.zeros(4, 90)
    logits[:2, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3, :-1] = -torch.inf
    rows = [{}, *[{"temperature": 1, "top_p": 0.9}] * 3]
    assert draw(logits, *rows).tolist() == [7, NOT_A_TOKEN, NOT_A_TOKEN, 89]


WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "rule",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 3.0, "top_k": 12},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=lambda rule: "-".join(rule),
)
def test_frequencies_are_those_of_transformers(rule):
    """Chi-squared of 40,000 draws against the softmax of what transformers' warpers leave."""
    count = 40_000
    logits = 2 * torch.randn(60, generator=torch.Generator().manual_seed(1))
    warpers = LogitsProcessorList(WARPERS[name](value) for name, value in rule.items())
    probabilities = warpers(torch.zeros(1, 0), logits[None].clone())[0].double().softmax(-1)
    args = (torch.zeros(count).int(), torch.arange(count).int(), table(rule), torch.tensor([3]))
    tokens = ops.sample_tokens(logits.expand(count, -1), *args)
    found = torch.bincount(tokens, minlength=60)
    assert int(found[probabilities == 0].sum()) == 0
    often = probabilities * count >= 5
    rest = [found[~often].sum(), probabilities[~often].sum() * count]
    found = torch.cat([found[often], torch.stack([rest[0]])]).double()
    expected = torch.cat([probabilities[often] * count, torch.stack([rest[1]])])
    if not expected[-1]:
        found, expected = found[:-1], expected[:-1]
    assert len(found) > 4 and chisquare(found, expected).pvalue > 1e-3


def test_seeds_and_positions_give_independent_draws():
    """Chi-squared of neighbours: seeds, positions, and both."""
    count = 30_000
    logits = torch.zeros(count, 4)
    steps = torch.arange(count)
    for seeds, lengths in ((steps, 0 * steps), (0 * steps, steps), (steps, steps)):
        args = (steps.int(), lengths.int(), table({"temperature": 1}).expand(count, -1))
        tokens = ops.sample_tokens(logits, args[0], args[1], args[2].contiguous(), seeds)
        pairs = torch.bincount(4 * tokens[:-1] + tokens[1:], minlength=16)
        assert chisquare(pairs).pvalue > 1e-3


def test_a_row_is_the_same_in_every_batch():
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(2))
    rows = [{"temperature": 0.5 + i, "top_p": 0.9, "top_k": 100 * i} for i in range(5)]
    settings, seeds = table(*rows), torch.arange(5) * 11
    slots, lengths = torch.tensor([3, 1, 4, 0, 2]).int(), torch.tensor([7, 8, 9, 10, 11]).int()
    together = ops.sample_tokens(logits, slots, lengths, settings, seeds)
    for i in range(5):
        one = slice(i, i + 1)
        alone = ops.sample_tokens(logits[one], slots[one], lengths[one], settings, seeds)
        assert alone.item() == together[i].item()


class TestPenalties:
    history = torch.tensor([[4, 4, 9, 1, 4, 9, 77, 77]], dtype=torch.int32)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(5))

    def penalize(self, length=6, **rule):
        given = (torch.zeros(1).int(), torch.tensor([length]).int(), table(rule), self.history)
        got, expected = self.logits.clone(), self.logits.clone()
        ops.penalize_logits(got, *given)
        sampling_reference.penalize_logits(expected, *given)
        assert torch.equal(got, expected)
        return got

    @pytest.mark.parametrize("penalty", [1.3, 0.4, 1.0])
    def test_repetition_is_that_of_transformers(self, penalty):
        got = self.penalize(repetition_penalty=penalty)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)
        assert torch.equal(got, theirs(self.history[:, :6].long(), self.logits.clone()))

    def test_presence_and_frequency_count_the_answer(self):
        """logit - presence * (count > 0) - frequency * count, as OpenAI's API documents it."""
        rule = {"presence_penalty": 0.25, "frequency_penalty": -0.5, "prompt_length": 1}
        expected = self.logits.clone()
        for token, count in ((4, 2), (9, 2), (1, 1)):  # not the 4 of the prompt
            expected[0, token] += -0.25 + 0.5 * count
        torch.testing.assert_close(self.penalize(**rule), expected, rtol=0, atol=1e-6)
        nothing = self.penalize(**rule | {"prompt_length": 6})
        assert torch.equal(nothing, self.logits)

    def test_all_together_and_on_several_rows(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(40, 300, generator=generator)
        history = torch.randint(0, 300, (50, 90), generator=generator, dtype=torch.int32)
        slots = torch.randperm(50, generator=generator)[:40].int()
        lengths = torch.randint(0, 91, (40,), generator=generator).int()
        settings = table(*[NEUTRAL] * 50)
        settings[:, 4] = torch.rand(50, generator=generator) + 0.5
        settings[::2, 5:7] = torch.rand(25, 2, generator=generator) - 0.5
        settings[:, 7] = torch.arange(50)
        got, expected = logits.clone(), logits.clone()
        ops.penalize_logits(got, slots, lengths, settings, history)
        sampling_reference.penalize_logits(expected, slots, lengths, settings, history)
        assert torch.equal(got, expected) and not torch.equal(got, logits)


def good():
    return {
        "logits": torch.zeros(2, 7),
        "slots": torch.tensor([0, 2], dtype=torch.int32),
        "lengths": torch.tensor([1, 3], dtype=torch.int32),
        "settings": table({}, {}, {}),
    }


SEEDS, HISTORY = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 7).half()}, "logits must be float32, got float16"),
        ({"logits": torch.zeros(2, 0)}, "V must be 1 to 4194304, got 0"),
        ({"slots": torch.zeros(2)}, "slots must be int32, got float32"),
        ({"slots": torch.tensor([0, 3]).int()}, r"slots\[1\] must be in 0..2, got 3"),
        ({"lengths": torch.zeros(3).int()}, r"lengths must be \[E=2\], got \[3\]"),
        ({"settings": torch.zeros(3, 8)}, "settings must be float64, got float32"),
        ({"settings": torch.zeros(3, 4).double()}, r"settings must be \[S, columns=8\]"),
    ],
)
def test_bad_arguments(change, message):
    args = (good() | change).values()
    with pytest.raises(ValueError, match="sample_tokens: " + message):
        ops.sample_tokens(*args, SEEDS)
    with pytest.raises(ValueError, match="penalize_logits: " + message):
        ops.penalize_logits(*args, HISTORY)


def test_bad_seeds_lengths_and_tokens():
    args = good()
    with pytest.raises(ValueError, match=r"seeds must be \[S=3\], got \[2\]"):
        ops.sample_tokens(*args.values(), SEEDS[:2])
    with pytest.raises(ValueError, match=r"history must be \[S=3, L\], got \[2, 4\]"):
        ops.penalize_logits(*args.values(), HISTORY[:2])
    with pytest.raises(ValueError, match="history must hold token ids below V=7, got 9"):
        ops.penalize_logits(*args.values(), HISTORY + 9)
    args["lengths"] = torch.tensor([1, 5]).int()
    with pytest.raises(ValueError, match=r"lengths\[1\] must be 0 to L=4, got 5"):
        ops.penalize_logits(*args.values(), HISTORY)


@pytest.mark.parametrize("instruction_set", ["avx2", "generic"])
def test_other_instruction_sets(instruction_set):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "not instruction_sets and not bad and not philox"]
    environment = os.environ | {"DIST_INT8_CPU_ISA": instruction_set}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
