"""Micro-batches, their results, and the sizes that ranks agree on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from dist_int8.pipeline.clock import LateSpan, Span
from dist_int8.pipeline.rules import Rule

UNKNOWN_TOKEN = -1  # the newest token of a sequence, which only the device knows yet

# Columns of the settings that the last stage keeps of every sequence; `int8.sampling_reference` has
# them in the same order.
SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "prompt_length",
)


class Kind(IntEnum):
    """What a message is."""

    STEP = 1  # run the tokens, sample after each segment marked in `emits`
    LOGITS = 2  # run the tokens, return the logits of all of them
    SHUTDOWN = 3  # pass on, then end
    TOKENS_RESULT = 4
    LOGITS_RESULT = 5


def _no_rows(columns: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(0, columns, dtype=dtype)


# most micro-batches start nothing
NO_STARTS = _no_rows(2, torch.int64)
NO_SETTINGS = _no_rows(len(SAMPLING_FIELDS), torch.float64)


@dataclass
class MicroBatch:
    """Tokens of some sequences, flattened, for one pass through the stages.

    Attributes:
        kind: STEP, LOGITS or SHUTDOWN.
        lane: the group of sequences it belongs to.
        step: number of the submission; results come back in this order.
        token_ids: int64 [T]; UNKNOWN_TOKEN only where one stage is the whole pipeline.
        segments: int32 [B, 3], rows (slot, start, count): `count` tokens of the sequence in KV slot
            `slot`, at positions start .. start + count - 1; concatenated in this order.
        emits: int64 [B], 1 where the token after the segment is sampled.
        starts: int64 [R, 2], rows (slot, seed) of sequences whose sampling settings come with this
            micro-batch, their first one.
        settings: float64 [R, len(SAMPLING_FIELDS)].
        rules: (slot, rule) of the sequences in `starts` that have any.
        spans: when the stages worked on it, in their order.
    """

    kind: Kind
    lane: int = 0
    step: int = 0
    token_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    segments: Tensor = field(default_factory=lambda: _no_rows(3, torch.int32))
    emits: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    starts: Tensor = NO_STARTS
    settings: Tensor = NO_SETTINGS
    rules: list[tuple[int, Rule]] = field(default_factory=list)
    spans: list[Span | LateSpan] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()


@dataclass
class Result:
    """What the last stage sends back for a micro-batch.

    Attributes:
        lane, step: of the micro-batch.
        values: tokens int64 [E] or logits fp32 [T, V], on the CPU.
        spans: of the stages that ran it.
        ready: an event of a GPU before which the values are not there yet; None: they are.
    """

    lane: int
    step: int
    values: Tensor
    spans: list[Span | LateSpan] = field(default_factory=list)
    ready: Any = None

    def is_ready(self) -> bool:
        """Whether the values are there."""
        return self.ready is None or bool(self.ready.query())

    def wait(self) -> None:
        """Waits until the values are there."""
        if self.ready is not None:
            self.ready.synchronize()


@dataclass(frozen=True)
class Limits:
    """Sizes that every rank of a pipeline agrees on; a message that exceeds them is refused."""

    num_slots: int
    max_tokens: int
    max_rows: int
    hidden_size: int
    vocab_size: int
