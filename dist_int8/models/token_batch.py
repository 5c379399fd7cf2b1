"""The tokens of one micro-batch, brought to a stage's device in one copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The tokens of one micro-batch: T tokens of B sequences, in segment order, without padding.

    All but `segments` are parts of one tensor on the stage's device, uploaded in one copy for which
    the host does not wait.

    Attributes:
        segments: int32 [B, 3] on the CPU, rows (slot, start, count).
        token_ids: int32 [T]; None where they are not known.
        places: int32 [T, 3], rows (slot, position, 1): the token's place in the KV cache.
        logit_rows: int32 [R], rows of the batch whose logits are wanted; None: all of them.
        slots: int32 [R], the slots of their sequences.
        lengths: int32 [R], tokens of their sequences so far.
    """

    segments: Tensor
    token_ids: Tensor | None
    places: Tensor
    logit_rows: Tensor | None
    slots: Tensor
    lengths: Tensor

    @property
    def positions(self) -> Tensor:
        """int32 [T], position of each token in its sequence."""
        return self.places[:, 1]

    @classmethod
    def from_segments(
        cls,
        token_ids: Iterable[int] | Tensor | None,
        segments: Iterable[tuple[int, int, int]] | Tensor,
        logit_rows: Iterable[int] | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Makes a batch from Python numbers or tensors on the CPU.

        Args:
            token_ids: T token ids, or None on a stage that is not the first.
            segments: (slot, start, count) of each sequence, counts adding up to T, slots distinct.
            logit_rows: rows (0 .. T-1) whose logits are wanted; None: all.
            device: where all but the segments go.
        """
        wanted = None if logit_rows is None else _ints(logit_rows)
        return cls._make(token_ids, _ints(segments).reshape(-1, 3), wanted, torch.device(device))

    @classmethod
    def of_emitting(
        cls, token_ids: Tensor, segments: Tensor, emits: Tensor, device: torch.device
    ) -> Self:
        """Makes a batch whose logits are wanted after the segments marked in `emits` [B]."""
        rows = _ints(segments)
        ends = rows[:, 2].cumsum(dtype=np.int32) - 1
        return cls._make(token_ids, rows, ends[emits.numpy() != 0], device)

    @classmethod
    def _make(
        cls,
        token_ids: Iterable[int] | Tensor | None,
        segments: Ints,
        logit_rows: Ints | None,
        device: torch.device,
    ) -> Self:
        places = _list_places(segments)
        num_tokens = len(places)
        ids = None if token_ids is None else _ints(token_ids)
        assert ids is None or len(ids) == num_tokens, (len(ids), segments)
        assert len(set(segments[:, 0].tolist())) == len(segments), "one segment per slot"
        last = places if logit_rows is None else places[logit_rows]
        parts = [places, last[:, 0], last[:, 1] + 1]
        parts += [] if ids is None else [ids]
        parts += [] if logit_rows is None else [logit_rows]
        where, slots, lengths, *rest = _upload(parts, device)
        return cls(
            torch.from_numpy(segments),
            None if ids is None else rest[0],
            where.view(-1, 3),
            None if logit_rows is None else rest[-1],
            slots,
            lengths,
        )


def _ints(values: Any) -> Ints:
    if isinstance(values, Tensor):
        values = values.numpy()
    elif not isinstance(values, np.ndarray):
        values = list(values)
    return np.asarray(values, dtype=np.int32)


def _list_places(segments: Ints) -> Ints:
    """Rows (slot, position, 1) of every token."""
    counts = segments[:, 2]
    if (counts == 1).all():
        return segments
    firsts = counts.cumsum() - counts  # row of each segment's first token
    places = np.repeat(segments, counts, axis=0)
    places[:, 1] += np.arange(len(places), dtype=np.int32) - np.repeat(firsts, counts)
    places[:, 2] = 1
    return places


def _upload(parts: list[Ints], device: torch.device) -> list[Tensor]:
    """The parts as flat int32 tensors on the device, by one copy that the host does not wait for.

    The pinned memory it is made from goes back to torch's cache, which gives it away again only
    once the copy is done.
    """
    whole = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
    if device.type == "cuda":
        whole = whole.pin_memory()
    return list(whole.to(device, non_blocking=True).split([part.size for part in parts]))
