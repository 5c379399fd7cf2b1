"""Chooses the next token of each sequence, on the last stage.

Greedy rows take the most probable token. The others go through transformers' logits processors one
by one, each with its own random generator, so that sampling is batch-invariant. The generator is
seeded again for every position: a sequence that is replayed draws the same tokens again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dist_int8.errors import ProtocolError
from dist_int8.pipeline.microbatch import SAMPLING_FIELDS, MicroBatch

NOT_A_TOKEN = -1  # in place of a token whose logits are NaN


@dataclass
class _Slot:
    processors: LogitsProcessorList
    generator: torch.Generator | None  # None: greedy
    token_ids: Tensor | None  # int64 [max_tokens], where a processor reads the sequence
    length: int = 0
    seed: int = 0
    position: int = 0  # position of the next token


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
            self._slots[slot] = self._configure(
                seed, dict(zip(SAMPLING_FIELDS, settings, strict=True))
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
            if state.processors and token_ids[row] != NOT_A_TOKEN:
                token_ids[row] = self._process(state, logits[row : row + 1].cpu())
            state.position += 1
        return torch.tensor(token_ids, dtype=torch.int64)

    def _configure(self, seed: int, settings: dict[str, float]) -> _Slot:
        processors = LogitsProcessorList()
        penalty = settings["repetition_penalty"]
        if penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        generator = None
        if settings["temperature"] > 0:
            generator = torch.Generator()
            processors.append(TemperatureLogitsWarper(settings["temperature"]))
            if settings["top_k"] > 0:
                processors.append(TopKLogitsWarper(int(settings["top_k"])))
            if settings["top_p"] < 1.0:
                processors.append(TopPLogitsWarper(settings["top_p"]))
        needs_tokens = penalty != 1.0
        token_ids = torch.empty(self.max_tokens, dtype=torch.int64) if needs_tokens else None
        return _Slot(processors, generator, token_ids, seed=seed)

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
