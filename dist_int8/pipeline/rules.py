"""Rules of choosing tokens that few requests have, and how they travel to the last stage.

A request without any sends nothing. On the wire a rule is int64 [5 + count]: slot, kind, number,
the bits of a float64, count, then `count` token ids. Positions are absolute (the prompt counts), so
that a sequence that is replayed is told the same.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from dist_int8.errors import ProtocolError

MAX_RULE_WORDS = 2048  # int64 of one request's rules
_HEAD = 5  # words in front of the token ids
_MAX_NUMBER = 2**40


class RuleKind(IntEnum):
    """What a rule does, in the order in which transformers does it."""

    BIAS = 1  # add `value` to the last of token_ids where the others came before
    NO_REPEAT = 2  # no `number` tokens in a row twice
    MIN_LENGTH = 3  # none of token_ids below `number` tokens
    FORCED_FIRST = 4  # the one of token_ids after a single token
    FORCED_LAST = 5  # one of token_ids as token `number`
    REMOVE_INVALID = 6  # NaN as 0, infinite logits as the largest number
    DECAY = 7  # token_ids more probable by the factor `value` per token after token `number`
    SUPPRESS = 8  # none of token_ids
    SUPPRESS_FIRST = 9  # none of token_ids after token `number`
    TOP_H = 10
    TYPICAL_P = 11
    EPSILON = 12
    ETA = 13


# kind -> (smallest, largest) value, (fewest, most) token ids
_EVERY = math.inf
_CHECKS: dict[RuleKind, tuple[tuple[float, float], tuple[float, float]]] = {
    RuleKind.BIAS: ((-math.inf, sys.float_info.max), (1, _EVERY)),
    RuleKind.NO_REPEAT: ((0, 0), (0, 0)),
    RuleKind.MIN_LENGTH: ((0, 0), (1, _EVERY)),
    RuleKind.FORCED_FIRST: ((0, 0), (1, 1)),
    RuleKind.FORCED_LAST: ((0, 0), (1, _EVERY)),
    RuleKind.REMOVE_INVALID: ((0, 0), (0, 0)),
    RuleKind.DECAY: ((5e-324, sys.float_info.max), (1, _EVERY)),
    RuleKind.SUPPRESS: ((0, 0), (1, _EVERY)),
    RuleKind.SUPPRESS_FIRST: ((0, 0), (1, _EVERY)),
    RuleKind.TOP_H: ((5e-324, 1), (0, 0)),
    RuleKind.TYPICAL_P: ((5e-324, 1), (0, 0)),
    RuleKind.EPSILON: ((5e-324, 1), (0, 0)),
    RuleKind.ETA: ((5e-324, 1), (0, 0)),
}


@dataclass(frozen=True)
class Rule:
    """One rule of one sequence; `RuleKind` says what number, value and token_ids mean."""

    kind: RuleKind
    number: int = 0
    value: float = 0.0
    token_ids: tuple[int, ...] = ()


def count_words(rules: Sequence[Rule]) -> int:
    """Number of int64 that the rules of one request take on the wire."""
    return sum(_HEAD + len(rule.token_ids) for rule in rules)


def pack_rules(rules: Sequence[tuple[int, Rule]]) -> Tensor:
    """int64 [W] of rules with their slots."""
    words: list[int] = []
    for slot, rule in rules:
        (bits,) = struct.unpack("<q", struct.pack("<d", rule.value))
        words += [slot, int(rule.kind), rule.number, bits, len(rule.token_ids), *rule.token_ids]
    return torch.tensor(words, dtype=torch.int64)


def unpack_rules(
    words: list[int], started_slots: Sequence[int], vocab_size: int
) -> list[tuple[int, Rule]]:
    """The rules with their slots, every value checked.

    Raises:
        ProtocolError: no rank of this pipeline sends such words.
    """
    rules = []
    begin = 0
    while begin < len(words):
        head = words[begin : begin + _HEAD]
        if len(head) < _HEAD or not 0 <= head[4] <= len(words) - begin - _HEAD:
            raise ProtocolError("control: rules must end with their last token id, got fewer words")
        end = begin + _HEAD + head[4]
        rules.append(_read_rule(head, words[begin + _HEAD : end], started_slots, vocab_size))
        begin = end
    return rules


def _read_rule(
    head: list[int], token_ids: list[int], started_slots: Sequence[int], vocab_size: int
) -> tuple[int, Rule]:
    slot, kind, number, bits, count = head
    if slot not in started_slots:
        raise ProtocolError("control: rules must be of slots that start, got another slot")
    if not all(0 <= token_id < vocab_size for token_id in token_ids):
        raise ProtocolError(f"control: token ids of rules must be 0 to {vocab_size - 1}")
    (value,) = struct.unpack("<d", struct.pack("<q", bits))
    checks = _CHECKS.get(kind)  # type: ignore[call-overload]
    if checks is None:
        raise ProtocolError(f"control: kinds of rules must be 1 to {max(_CHECKS)}, got {kind}")
    (least, most), (fewest, many) = checks
    lowest = 1 if kind == RuleKind.NO_REPEAT else 0
    if not (least <= value <= most and fewest <= count <= many and lowest <= number <= _MAX_NUMBER):
        raise ProtocolError(
            f"control: rules must be those of a request, got {RuleKind(kind).name} with "
            f"{(number, value, count)}"
        )
    return slot, Rule(RuleKind(kind), number, value, tuple(token_ids))
