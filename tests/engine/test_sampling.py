"""The sampling state of slots: settings that arrive, tokens that are remembered, rarer rules.

What the ops do with them is tested in tests/int8/test_sampling.py, and against transformers in
tests/api/test_generation_config.py.
"""

import pytest
import torch

from dist_int8.config import GenerationSettings
from dist_int8.engine.sampling import TokenSampler
from dist_int8.errors import ProtocolError
from dist_int8.int8.sampling_reference import NOT_A_TOKEN, SETTINGS
from dist_int8.models import TokenBatch
from dist_int8.pipeline import wire
from dist_int8.pipeline.microbatch import SAMPLING_FIELDS, Kind, Limits, MicroBatch
from dist_int8.pipeline.rules import Rule, RuleKind

LIMITS = Limits(num_slots=4, max_tokens=16, max_rows=32, hidden_size=8, vocab_size=50)
NEUTRAL = {name: 0.0 for name in SAMPLING_FIELDS} | {"top_p": 1.0, "repetition_penalty": 1.0}
ON_CPU = torch.device("cpu")


class Sequences:
    """A sampler, and sequences in its slots that go on with the tokens it chooses."""

    def __init__(self, rows, prompt=(1, 2, 3), seed=0, rules=()):
        self.sampler = TokenSampler(LIMITS)
        self.tokens = {slot: list(prompt) for slot in range(len(rows))}
        self.starts = torch.tensor([[slot, seed + slot] for slot in self.tokens])
        values = [[(NEUTRAL | row)[name] for name in SAMPLING_FIELDS] for row in rows]
        self.settings = torch.tensor(values, dtype=torch.float64)
        self.rules = list(rules)
        self.started = False

    def step(self, logits, slots=None):
        """Gives the next tokens of all slots, or of these, and appends them."""
        slots = list(self.tokens) if slots is None else slots
        parts = [self.tokens[slot][-1:] if self.started else self.tokens[slot] for slot in slots]
        segments = [
            (slot, len(self.tokens[slot]) - len(part), len(part))
            for slot, part in zip(slots, parts, strict=True)
        ]
        micro_batch = MicroBatch(
            Kind.STEP,
            token_ids=torch.tensor([token for part in parts for token in part]),
            segments=torch.tensor(segments, dtype=torch.int32),
            emits=torch.ones(len(slots), dtype=torch.int64),
        )
        if not self.started:
            micro_batch.starts, micro_batch.settings = self.starts, self.settings
            micro_batch.rules = self.rules
        self.started = True
        batch = TokenBatch.of_emitting(
            micro_batch.token_ids, micro_batch.segments, micro_batch.emits, ON_CPU
        )
        self.sampler.take_settings(micro_batch)
        chosen = self.sampler.sample(logits.clone(), micro_batch, batch).tolist()
        for slot, token in zip(slots, chosen, strict=True):
            self.tokens[slot].append(token)
        return chosen


def test_the_columns_of_messages_are_those_of_the_op():
    assert SAMPLING_FIELDS == SETTINGS  # `pipeline` may not import `int8`


def test_greedy_takes_the_most_probable_token():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert Sequences([{}, {}]).step(logits) == logits.argmax(-1).tolist()


def test_a_row_with_nan_gives_no_token_and_leaves_the_others_alone():
    logits = torch.zeros(3, 5)
    logits[0, 3] = logits[2, 3] = float("nan")
    logits[1, 2] = logits[2, 4] = 1.0
    rules = [(2, Rule(RuleKind.REMOVE_INVALID)), (1, Rule(RuleKind.SUPPRESS, token_ids=(1,)))]
    assert Sequences([{}] * 3, rules=rules).step(logits) == [NOT_A_TOKEN, 2, 4]


def test_penalties_follow_what_the_sampler_has_chosen():
    """Token 4 is the best until it costs too much; the prompt counts for repetition alone."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 2.5, 4.0]])
    assert Sequences([{"repetition_penalty": 10.0}], prompt=(4,)).step(logits) == [3]
    fields = {"frequency_penalty": 1.0, "prompt_length": 1.0}
    sequence = Sequences([fields], prompt=(4,))
    assert [sequence.step(logits)[0] for _ in range(4)] == [4, 4, 3, 4]
    once = Sequences([{"presence_penalty": 1.0, "prompt_length": 1.0}], prompt=(4,))
    assert [once.step(logits)[0] for _ in range(4)] == [4, 4, 4, 4]
    once = Sequences([{"presence_penalty": 2.0, "prompt_length": 1.0}], prompt=(4,))
    assert [once.step(logits)[0] for _ in range(3)] == [4, 3, 4]


def test_a_sequence_that_takes_over_a_slot_begins_anew():
    logits = torch.tensor([[0.0, 0.0, 0.0, 2.5, 4.0]])
    first = Sequences([{"repetition_penalty": 10.0}], prompt=(4,))
    first.step(logits)
    second = Sequences([{}], prompt=(4,))
    second.sampler = first.sampler
    assert second.step(logits) == [4]


def test_sampling_is_batch_invariant_and_goes_on_alike():
    settings = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2}
    logits = torch.randn(10, 3, 50, generator=torch.Generator().manual_seed(2))
    together, alone = Sequences([settings, settings, {}], seed=7), Sequences([settings], seed=7)
    first = [together.step(step)[0] for step in logits]
    assert first == [alone.step(step[:1])[0] for step in logits]
    other = Sequences([settings], seed=8)
    assert first != [other.step(step[:1])[0] for step in logits]


def test_a_warper_of_transformers_comes_after_top_k():
    """typical_p keeps what is near the entropy: among two tokens, not the more probable one."""
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    rules = [(0, Rule(RuleKind.TYPICAL_P, value=0.01))]
    rows = [{"temperature": 1.0, "top_k": 2.0}]
    drawn = {Sequences(rows, seed=seed, rules=rules).step(logits)[0] for seed in range(20)}
    assert drawn == {0}  # 2/3 and 1/3: the entropy 0.64 is nearer to -log(2/3)
    wide = [{"temperature": 1.0}]
    drawn = {Sequences(wide, seed=seed, rules=rules).step(logits)[0] for seed in range(20)}
    assert drawn == {1}  # 0.90 is nearer to -log(0.3)


def test_settings_that_have_not_arrived_are_refused():
    sequences = Sequences([{}])
    sequences.started = True
    with pytest.raises(ProtocolError, match="no sampling settings have arrived for slot 0"):
        sequences.step(torch.zeros(1, 5))


def test_settings_and_messages_have_the_same_smallest_temperature():
    smallest = wire.LEAST_TEMPERATURE  # `pipeline` may not import `config`
    assert GenerationSettings.from_values({"temperature": smallest}, "test").sampling
    with pytest.raises(ValueError, match="temperature must be 0 or at least"):
        GenerationSettings.from_values({"temperature": 0.999 * smallest}, "test")
