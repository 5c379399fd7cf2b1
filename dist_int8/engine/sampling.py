"""Chooses the next token of each sequence, on the last stage.

Greedy rows take the most probable token. The others go through transformers' logits processors one
by one, each with its own random generator, so that sampling is batch-invariant. The generator is
seeded again for every position: a sequence that is replayed draws the same tokens again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from dist_int8.errors import ProtocolError
from dist_int8.pipeline.microbatch import SAMPLING_FIELDS, MicroBatch
from dist_int8.pipeline.rules import Rule, RuleKind

NOT_A_TOKEN = -1  # in place of a token whose logits are NaN


@dataclass
class _Slot:
    processors: LogitsProcessorList
    generator: torch.Generator | None  # None: greedy
    token_ids: Tensor | None  # int64 [max_tokens], where a processor reads the sequence
    length: int = 0
    seed: int = 0
    position: int = 0  # position of the next token
    removes_nan: bool = False


class TokenSampler:
    """Holds the sampling state of every slot.

    Args:
        max_tokens: maximum number of tokens in a slot.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._slots: dict[int, _Slot] = {}

    def observe(self, micro_batch: MicroBatch) -> None:
        """Takes the sampling settings and the tokens of a micro-batch.

        Raises:
            ProtocolError: the settings of a sequence have not arrived.
        """
        for (slot, seed), settings in zip(
            micro_batch.starts.tolist(), micro_batch.settings.tolist(), strict=True
        ):
            rules = [rule for started, rule in micro_batch.rules if started == slot]
            self._slots[slot] = self._configure(
                seed, dict(zip(SAMPLING_FIELDS, settings, strict=True)), rules
            )
        row = 0
        for slot, start, count in micro_batch.segments.tolist():
            if slot not in self._slots:
                raise ProtocolError(f"control: no sampling settings have arrived for slot {slot}")
            state = self._slots[slot]
            state.position = start + count
            if state.token_ids is not None:
                state.token_ids[start : start + count] = micro_batch.token_ids[row : row + count]
                state.length = start + count
            row += count

    def sample(self, logits: Tensor, slots: list[int]) -> Tensor:
        """Chooses tokens int64 [E] from logits fp32 [E, V]; NOT_A_TOKEN where they are NaN.

        Args:
            logits: one row per slot.
            slots: the KV slots [E], whose settings `observe` has taken.
        """
        token_ids = _take_most_probable(logits)
        for row, slot in enumerate(slots):
            state = self._slots[slot]
            if state.processors and (token_ids[row] != NOT_A_TOKEN or state.removes_nan):
                token_ids[row] = self._process(state, logits[row : row + 1].cpu())
            state.position += 1
        return torch.tensor(token_ids, dtype=torch.int64)

    def _configure(self, seed: int, settings: dict[str, float], rules: list[Rule]) -> _Slot:
        """Makes the processors in the order of transformers."""
        penalty, temperature = settings["repetition_penalty"], settings["temperature"]
        processors = LogitsProcessorList(_make_processors(rules, RuleKind.BIAS, RuleKind.BIAS))
        if penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        processors += _make_processors(rules, RuleKind.NO_REPEAT, RuleKind.SUPPRESS_FIRST)
        if temperature > 0:
            processors.append(TemperatureLogitsWarper(temperature))
            processors += _make_processors(rules, RuleKind.TOP_H, RuleKind.TOP_H)
            if settings["top_k"] > 0:
                processors.append(TopKLogitsWarper(int(settings["top_k"])))
            if settings["top_p"] < 1.0:
                processors.append(TopPLogitsWarper(settings["top_p"]))
            processors += _make_processors(rules, RuleKind.MIN_P, RuleKind.ETA)
        needs_tokens = penalty != 1.0 or bool(rules)
        return _Slot(
            processors,
            torch.Generator() if temperature > 0 else None,
            torch.empty(self.max_tokens, dtype=torch.int64) if needs_tokens else None,
            seed=seed,
            removes_nan=any(rule.kind == RuleKind.REMOVE_INVALID for rule in rules),
        )

    def _process(self, state: _Slot, logits: Tensor) -> int:
        seen = torch.zeros(1, 0, dtype=torch.int64)
        if state.token_ids is not None:
            seen = state.token_ids[None, : state.length]
        scores = state.processors(seen, logits)
        if state.generator is None:
            return int(scores.argmax())
        probabilities = scores.softmax(dim=-1)
        if probabilities[0, 0].isnan():  # a score is infinite, for example from a tiny penalty
            return NOT_A_TOKEN
        state.generator.manual_seed(_mix(state.seed, state.position))
        return int(torch.multinomial(probabilities, 1, generator=state.generator))


# The processor of transformers for the rules of one kind; only of biases there are several.
_PROCESSORS: dict[RuleKind, Callable[[Sequence[Rule]], LogitsProcessor]] = {
    RuleKind.BIAS: lambda rules: SequenceBiasLogitsProcessor(
        {rule.token_ids: rule.value for rule in rules}
    ),
    RuleKind.NO_REPEAT: lambda rules: NoRepeatNGramLogitsProcessor(rules[0].number),
    RuleKind.MIN_LENGTH: lambda rules: MinLengthLogitsProcessor(
        rules[0].number, list(rules[0].token_ids)
    ),
    RuleKind.FORCED_FIRST: lambda rules: ForcedBOSTokenLogitsProcessor(rules[0].token_ids[0]),
    RuleKind.FORCED_LAST: lambda rules: ForcedEOSTokenLogitsProcessor(
        rules[0].number, list(rules[0].token_ids)
    ),
    RuleKind.REMOVE_INVALID: lambda rules: InfNanRemoveLogitsProcessor(),
    RuleKind.DECAY: lambda rules: ExponentialDecayLengthPenalty(
        (rules[0].number, rules[0].value), list(rules[0].token_ids), input_ids_seq_length=0
    ),
    RuleKind.SUPPRESS: lambda rules: SuppressTokensLogitsProcessor(rules[0].token_ids),
    RuleKind.SUPPRESS_FIRST: lambda rules: SuppressTokensAtBeginLogitsProcessor(
        rules[0].token_ids, rules[0].number
    ),
    RuleKind.TOP_H: lambda rules: TopHLogitsWarper(rules[0].value),
    RuleKind.MIN_P: lambda rules: MinPLogitsWarper(rules[0].value),
    RuleKind.TYPICAL_P: lambda rules: TypicalLogitsWarper(rules[0].value),
    RuleKind.EPSILON: lambda rules: EpsilonLogitsWarper(rules[0].value),
    RuleKind.ETA: lambda rules: EtaLogitsWarper(rules[0].value),
}


def _make_processors(rules: list[Rule], first: RuleKind, last: RuleKind) -> list[LogitsProcessor]:
    """Makes the processors of the kinds from `first` to `last`, in their order."""
    return [
        make(chosen)
        for kind, make in _PROCESSORS.items()
        if first <= kind <= last and (chosen := [rule for rule in rules if rule.kind == kind])
    ]


def _mix(seed: int, position: int) -> int:
    """Derives a seed for every position, so that a sequence can be resumed at any of them.

    The finalizer of splitmix64 (Steele, Lea and Flood 2014), after one step per position.
    """
    bits = 2**64 - 1
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) & bits
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & bits
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & bits
    return mixed ^ mixed >> 31


def _take_most_probable(logits: Tensor) -> list[int]:
    """The first of the largest logits of each row; NOT_A_TOKEN where one is NaN."""
    if not logits.is_cpu:
        values, token_ids = logits.max(dim=-1)
        found: list[int] = token_ids.masked_fill(values.isnan(), NOT_A_TOKEN).tolist()
        return found
    rows = logits.numpy()  # its argmax is vectorized, torch's on CPUs takes 20 times as long
    found = rows.argmax(axis=-1).tolist()  # a NaN counts as the largest
    return [NOT_A_TOKEN if np.isnan(rows[row, token]) else token for row, token in enumerate(found)]
