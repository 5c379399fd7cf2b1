"""Chooses the next token of each sequence, on the last stage and its device.

Two ops serve all rows together, `ops.penalize_logits` and `ops.sample_tokens`: no logits are copied
to the host. A draw is a function of the sequence's seed and length, so that sampling is
batch-invariant, and a sequence that is replayed draws the same tokens again.

What is known of the sequences lies in tables on the device, a row per slot and one for rows that
only fill up a micro-batch. With `keeps_tokens` a step needs nothing from the host that it could not
know before the step ahead of it has ended: a token may be asked for before it is known there, as
UNKNOWN_TOKEN.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_int8.engine.processors import Processors
from dist_int8.errors import ProtocolError
from dist_int8.int8 import ops
from dist_int8.models.token_batch import TokenBatch
from dist_int8.pipeline.microbatch import SAMPLING_FIELDS, Limits, MicroBatch

_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_DONE_BY_PROCESSORS = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}


class TokenSampler:
    """Holds the sampling state of every slot, in tables on the device of the logits.

    Args:
        limits: slots and tokens of the KV cache.
        device: of the logits.
        keeps_tokens: whether every step writes down its tokens, instead of only those steps whose
            sequences need it; None: on a GPU.
    """

    def __init__(
        self,
        limits: Limits,
        device: torch.device | str = "cpu",
        keeps_tokens: bool | None = None,
    ) -> None:
        device, rows = torch.device(device), limits.num_slots + 1
        self._keeps_tokens = device.type == "cuda" if keeps_tokens is None else keeps_tokens
        settings = np.zeros((rows, len(SAMPLING_FIELDS)))
        settings[:, SAMPLING_FIELDS.index("repetition_penalty")] = 1.0
        self._settings = torch.from_numpy(settings).to(device)
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._newest = torch.zeros(rows, dtype=torch.int32, device=device)
        # From numpy: the operating system hands its zeros out when they are first written.
        history = np.zeros((rows, limits.max_tokens), dtype=np.int32)
        self._history = torch.from_numpy(history).to(device)
        self._started: set[int] = set()
        self._penalized: set[int] = set()
        self._processors: dict[int, Processors] = {}

    def take_settings(self, micro_batch: MicroBatch) -> bool:
        """Takes the settings of the sequences that start with a micro-batch.

        Returns whether `draw` serves all of its sequences, on the device alone.

        Raises:
            ProtocolError: the settings of a sequence have not arrived.
        """
        self._start(micro_batch)
        slots = micro_batch.segments.numpy()[:, 0].tolist()
        if unknown := set(slots) - self._started:
            raise ProtocolError(
                f"control: no sampling settings have arrived for slot {min(unknown)}"
            )
        return self._processors.keys().isdisjoint(slots)

    def fill_in(self, batch: TokenBatch) -> TokenBatch:
        """The batch with the newest token of its sequence in place of each UNKNOWN_TOKEN.

        Without `keeps_tokens` none is known, and none may be asked for.
        """
        if not self._keeps_tokens:
            return batch
        ids, slots = batch.token_ids, batch.segments.places.select(1, 0)
        assert ids is not None
        return replace(
            batch, token_ids=torch.where(ids < 0, self._newest.index_select(0, slots), ids)
        )

    def draw(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """Chooses the tokens after a micro-batch whose sequences have no rarer rules.

        Args:
            logits: fp32 [E, V], a row for every segment that emits; changed in place.
            batch: its tokens on the device.

        Returns:
            int64 [E] on the device; NOT_A_TOKEN where the logits are NaN.
        """
        if self._keeps_tokens:
            self._write_down(batch)
            ops.penalize_logits(logits, batch.slots, batch.lengths, self._settings, self._history)
        return self._draw(logits, batch)

    def sample(self, logits: Tensor, micro_batch: MicroBatch, batch: TokenBatch) -> Tensor:
        """The same for any micro-batch, whose settings `take_settings` has taken.

        Args:
            logits: as of `draw`.
            micro_batch: which sequences it has.
            batch: its tokens on the device.
        """
        penalized = False
        writes = self._keeps_tokens
        if self._penalized or self._processors:  # of other sequences, perhaps
            slots = micro_batch.segments.numpy()[:, 0].tolist()
            penalized = not self._penalized.isdisjoint(slots)
            writes |= penalized or not self._processors.keys().isdisjoint(slots)
        if writes:
            self._write_down(batch)
        if not len(logits):
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        rows = self._list_processors(micro_batch)
        for processors, row, tokens in rows:
            processors.before_penalties(tokens, logits[row : row + 1])
        if penalized:
            ops.penalize_logits(logits, batch.slots, batch.lengths, self._settings, self._history)
        for processors, row, tokens in rows:
            processors.after_penalties(tokens, logits[row : row + 1])
        return self._draw(logits, batch)

    def _draw(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        table = (batch.slots, batch.lengths, self._settings, self._seeds)
        tokens = ops.sample_tokens(logits, *table)
        if self._keeps_tokens:
            self._newest.index_copy_(0, batch.slots.long(), tokens.int().clamp(min=0))
        return tokens

    def _write_down(self, batch: TokenBatch) -> None:
        """Writes the batch's tokens into the history of their sequences."""
        assert batch.token_ids is not None
        slots, positions, _ = batch.segments.places.long().unbind(1)
        at = slots * self._history.shape[1] + positions
        self._history.view(-1).index_copy_(0, at, batch.token_ids)

    def _start(self, micro_batch: MicroBatch) -> None:
        """Takes the settings of the sequences that start."""
        if not len(micro_batch.starts):
            return
        table = micro_batch.settings.numpy().copy()
        slots, seeds = np.ascontiguousarray(micro_batch.starts.numpy().T)
        for row, slot in enumerate(slots.tolist()):
            settings = dict(zip(SAMPLING_FIELDS, table[row].tolist(), strict=True))
            rules = [rule for started, rule in micro_batch.rules if started == slot]
            self._started.add(slot)
            self._penalized.discard(slot)
            self._processors.pop(slot, None)
            if any(settings[name] != neutral for name, neutral in _PENALTIES.items()):
                self._penalized.add(slot)
            if rules:
                self._processors[slot] = Processors(rules, settings)
                if self._processors[slot].warps:
                    settings |= _DONE_BY_PROCESSORS
                    table[row] = list(settings.values())
        device = self._settings.device
        places = _send(slots, device)
        self._settings.index_copy_(0, places, _send(table, device))
        self._seeds.index_copy_(0, places, _send(seeds, device))

    def _list_processors(self, micro_batch: MicroBatch) -> list[tuple[Processors, int, Tensor]]:
        """Lists, of segments with rules that emit: processors, row, token ids int64 [1, L]."""
        if not self._processors:
            return []
        pairs = zip(micro_batch.segments.tolist(), micro_batch.emits.tolist(), strict=True)
        emitting = [segment for segment, emits in pairs if emits]
        return [
            (self._processors[slot], row, self._history[slot : slot + 1, : start + count].long())
            for row, (slot, start, count) in enumerate(emitting)
            if slot in self._processors
        ]


def _send(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The values on the device, by a copy that the host does not wait for."""
    there = torch.from_numpy(values)
    if device.type == "cuda":
        there = there.pin_memory()
    return there.to(device, non_blocking=True)
