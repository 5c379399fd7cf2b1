"""Rules on the wire: what goes in comes out, and no forged word gets through."""

import math

import pytest
import torch

from dist_int8.errors import ProtocolError
from dist_int8.pipeline import wire
from dist_int8.pipeline.microbatch import Kind, Limits, MicroBatch
from dist_int8.pipeline.rules import MAX_RULE_WORDS, Rule, RuleKind, pack_rules, unpack_rules

LIMITS = Limits(num_slots=4, max_tokens=64, max_rows=32, hidden_size=8, vocab_size=100)
RULES = [
    (2, Rule(RuleKind.BIAS, value=-math.inf, token_ids=(7, 99))),
    (2, Rule(RuleKind.MIN_LENGTH, 12, token_ids=(3,))),
    (1, Rule(RuleKind.TYPICAL_P, value=0.05)),
    (1, Rule(RuleKind.DECAY, 2, 1.25, (3, 4))),
]


def make_micro_batch(rules) -> MicroBatch:
    return MicroBatch(
        Kind.STEP,
        token_ids=torch.tensor([5, 6]),
        segments=torch.tensor([[2, 0, 1], [1, 0, 1]], dtype=torch.int32),
        emits=torch.ones(2, dtype=torch.int64),
        starts=torch.tensor([[2, 1], [1, 2]]),
        settings=torch.tensor([[0, 0, 1, 0, 1, 0, 0, 1]] * 2, dtype=torch.float64),
        rules=rules,
        spans=[(1, 2)],
    )


def test_rules_come_out_as_they_went_in():
    got = wire.unpack(*wire.pack(make_micro_batch(RULES)), LIMITS)
    assert got.rules == RULES and got.spans == [(1, 2)]


def test_a_micro_batch_without_rules_is_no_longer_for_them():
    header, control = wire.pack(make_micro_batch([]))
    assert header[9] == 0 and wire.control_size(header, LIMITS) == control.numel()
    assert wire.unpack(header, control, LIMITS).rules == []


@pytest.mark.parametrize("words", [-1, 2 * MAX_RULE_WORDS + 1, 2**62])
def test_a_forged_number_of_words_is_refused(words):
    header, _ = wire.pack(make_micro_batch(RULES))
    header[9] = words
    with pytest.raises(ProtocolError, match="words of rules must be 0 to 2048 per start"):
        wire.control_size(header, LIMITS)


def test_the_largest_message_has_room_for_the_rules_of_every_slot():
    rule = Rule(RuleKind.SUPPRESS, token_ids=(1,) * (MAX_RULE_WORDS - 5))
    batch = make_micro_batch([(2, rule), (1, rule)])
    assert wire.pack(batch)[1].numel() <= wire.max_control_size(LIMITS)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 3, "rules must be of slots that start"),
        (1, 0, "kinds of rules must be 1 to 13, got 0"),
        (1, 14, "kinds of rules"),
        (1, int(RuleKind.TOP_H), "rules must be those of a request"),  # it has no token ids
        (2, -1, "rules must be those of a request"),
        (2, 2**60, "rules must be those of a request"),
        (3, 0x7FF8000000000000, "rules must be those of a request"),  # NaN
        (3, 0x7FF0000000000000, "rules must be those of a request"),  # infinity
        (4, 0, "rules must"),  # the next words are read as a rule
        (4, -2, "rules must end with their last token id"),
        (4, 2**40, "rules must end with their last token id"),
        (5, 100, "token ids of rules must be 0 to 99"),
        (6, -1, "token ids of rules must be 0 to 99"),
    ],
)
def test_forged_words_are_refused(position, value, message):
    words = pack_rules(RULES[:1]).tolist()
    assert unpack_rules(words, [2], 100) == RULES[:1]
    words[position] = value
    with pytest.raises(ProtocolError, match=message):
        unpack_rules(words, [2], 100)


@pytest.mark.parametrize("kind", list(RuleKind))
def test_every_kind_refuses_what_is_not_a_number(kind):
    with pytest.raises(ProtocolError, match="rules must be those of a request"):
        unpack_rules(pack_rules([(0, Rule(kind, 1, math.nan, (1,)))]).tolist(), [0], 100)
