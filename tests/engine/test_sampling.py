"""Sampling by known distributions, greedy decoding, and batch invariance."""

import pytest
import torch

from dist_int8.config import GenerationSettings
from dist_int8.engine.sampling import NOT_A_TOKEN, TokenSampler
from dist_int8.pipeline import wire
from dist_int8.pipeline.microbatch import Kind, MicroBatch


def begin(sampler, rows, prompt=(1, 2, 3)):
    """Starts slot i with the seed and settings of rows[i]."""
    count = len(prompt)
    sampler.observe(
        MicroBatch(
            Kind.STEP,
            token_ids=torch.tensor(list(prompt) * len(rows)),
            segments=torch.tensor([[s, 0, count] for s in range(len(rows))], dtype=torch.int32),
            emits=torch.ones(len(rows), dtype=torch.int64),
            starts=torch.tensor([[slot, seed] for slot, (seed, _) in enumerate(rows)]),
            settings=torch.tensor([settings for _, settings in rows], dtype=torch.float64),
        )
    )


def greedy(seed=0):
    return seed, (0.0, 0.0, 1.0, 1.0)


def test_greedy_takes_the_most_probable_token():
    sampler = TokenSampler(16)
    begin(sampler, [greedy(), greedy()])
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampler.sample(logits, [0, 1]), logits.argmax(-1))


def test_a_row_with_nan_gives_no_token_and_leaves_the_others_alone():
    sampler = TokenSampler(16)
    begin(sampler, [greedy(), greedy()])
    logits = torch.zeros(2, 5)
    logits[0, 3] = float("nan")
    logits[1, 2] = 1.0
    assert sampler.sample(logits, [0, 1]).tolist() == [NOT_A_TOKEN, 2]


def test_repetition_penalty_applies_to_the_prompt():
    sampler = TokenSampler(16)
    begin(sampler, [(0, (0.0, 0.0, 1.0, 10.0))], prompt=(4,))
    logits = torch.tensor([[0.0, 0.0, 0.0, 2.0, 3.0]])
    assert sampler.sample(logits, [0]).tolist() == [3]


def test_top_k_and_top_p_keep_only_the_most_probable_tokens():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    for settings, allowed in (((1.0, 2.0, 1.0, 1.0), {0, 1}), ((1.0, 0.0, 0.75, 1.0), {0, 1})):
        sampler = TokenSampler(16)
        begin(sampler, [(5, settings)])
        seen = {int(sampler.sample(logits, [0])) for _ in range(200)}
        assert seen == allowed


def test_frequencies_follow_the_softmax_at_the_temperature():
    sampler = TokenSampler(16)
    begin(sampler, [(1, (2.0, 0.0, 1.0, 1.0))])
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    draws = torch.tensor([int(sampler.sample(logits, [0])) for _ in range(4000)])
    expected = (logits[0] / 2.0).softmax(0)
    assert torch.bincount(draws, minlength=3).div(4000) == pytest.approx(expected, abs=0.03)


def test_sampling_is_batch_invariant():
    settings = (1.0, 0.0, 0.95, 1.2)
    logits = torch.randn(20, 3, 40, generator=torch.Generator().manual_seed(2))
    together, alone = TokenSampler(16), TokenSampler(16)
    begin(together, [(7, settings), (8, settings), greedy()])
    begin(alone, [(7, settings)])
    first = [int(together.sample(step, [0, 1, 2])[0]) for step in logits]
    assert first == [int(alone.sample(step[:1], [0])) for step in logits]
    again = TokenSampler(16)
    begin(again, [(8, settings)])
    assert first != [int(again.sample(step[:1], [0])) for step in logits]


def test_settings_and_messages_have_the_same_smallest_temperature():
    smallest = wire.LEAST_TEMPERATURE  # `pipeline` may not import `config`
    assert GenerationSettings.from_values({"temperature": smallest}, "test").sampling
    with pytest.raises(ValueError, match="temperature must be 0 or at least"):
        GenerationSettings.from_values({"temperature": 0.999 * smallest}, "test")
