"""The tokens of one micro-batch, brought to a stage's device in one copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_int8.int8.segments import Ints, Segments, upload


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The tokens of one micro-batch: T tokens of B sequences, in segment order, without padding.

    What lies on the device came there in one copy, for which the host does not wait.

    Attributes:
        segments: which tokens of which sequences these are.
        token_ids: int32 [T] on the device; None where they are not known.
        logit_rows: int32 [R] on the device, rows of the batch whose logits are wanted; None: all.
        slots: int32 [R] on the device, the slots of their sequences.
        lengths: int32 [R] on the device, tokens of their sequences so far.
    """

    segments: Segments
    token_ids: Tensor | None
    logit_rows: Tensor | None
    slots: Tensor
    lengths: Tensor

    @property
    def positions(self) -> Tensor:
        """int32 [T] on the device, position of each token in its sequence."""
        return self.segments.places[:, 1]

    @classmethod
    def from_segments(
        cls,
        token_ids: Iterable[int] | Tensor | None,
        segments: Iterable[tuple[int, int, int]] | Tensor,
        logit_rows: Iterable[int] | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenBatch:
        """Makes a batch from Python numbers or tensors on the CPU.

        Args:
            token_ids: T token ids, or None on a stage that is not the first.
            segments: (slot, start, count) of each sequence, counts adding up to T, slots distinct.
            logit_rows: rows (0 .. T-1) whose logits are wanted; None: all.
            device: of the stage.
        """
        wanted = None if logit_rows is None else _ints(logit_rows)
        return cls._make(token_ids, _ints(segments).reshape(-1, 3), wanted, torch.device(device))

    @classmethod
    def of_emitting(
        cls, token_ids: Tensor, segments: Tensor, emits: Tensor, device: torch.device
    ) -> TokenBatch:
        """Makes a batch whose logits are wanted after the segments marked in `emits` [B]."""
        rows, emitting = _ints(segments), emits.numpy() != 0
        if len(rows) == len(token_ids) and emitting.all():  # a decode step: every row is wanted
            return cls._make(token_ids, rows, None, device)
        ends = rows[:, 2].cumsum(dtype=np.int32) - 1
        return cls._make(token_ids, rows, ends[emitting], device)

    @classmethod
    def _make(
        cls,
        token_ids: Iterable[int] | Tensor | None,
        rows: Ints,
        logit_rows: Ints | None,
        device: torch.device,
    ) -> TokenBatch:
        assert len(set(rows[:, 0].tolist())) == len(rows), "one segment per slot"
        ids = None if token_ids is None else _ints(token_ids)
        parts, make = cls.parts_of(ids, rows, logit_rows)
        return make(upload(parts, device))

    @classmethod
    def parts_of(
        cls, token_ids: Ints | None, rows: Ints, logit_rows: Ints | None
    ) -> tuple[list[Ints], Callable[[list[Tensor]], TokenBatch]]:
        """Lists what goes to the device, and returns what makes the batch of it once there."""
        of_segments, make_segments = Segments.parts_of(rows)
        places = of_segments[0]
        assert token_ids is None or len(token_ids) == len(places), (len(token_ids), rows)
        last = places if logit_rows is None else places[logit_rows]
        parts = [last[:, 0], last[:, 1] + 1]
        parts += [part for part in (token_ids, logit_rows) if part is not None]
        num_parts = len(parts)

        def make(there: list[Tensor]) -> TokenBatch:
            return cls(
                make_segments(there[num_parts:]),
                None if token_ids is None else there[2],
                None if logit_rows is None else there[num_parts - 1],
                there[0],
                there[1],
            )

        return [*parts, *of_segments], make


def _ints(values: Any) -> Ints:
    if isinstance(values, Tensor):
        values = values.numpy()
    elif not isinstance(values, np.ndarray):
        values = list(values)
    return np.asarray(values, dtype=np.int32)
