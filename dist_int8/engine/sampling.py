"""Chooses the next token of each sequence, on the last stage and its device.

Two ops serve all rows together, `ops.penalize_logits` and `ops.sample_tokens`: no logits are copied
to the host. A draw is a function of the sequence's seed and length, so that sampling is
batch-invariant, and a sequence that is replayed draws the same tokens again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dist_int8.engine.processors import Processors
from dist_int8.errors import ProtocolError
from dist_int8.int8 import ops
from dist_int8.models.token_batch import TokenBatch
from dist_int8.pipeline.microbatch import SAMPLING_FIELDS, Limits, MicroBatch

NOT_A_TOKEN = -1  # in place of a token whose logits are NaN

_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_DONE_BY_PROCESSORS = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}


class TokenSampler:
    """Holds the sampling state of every slot, in tables on the device of the logits.

    Args:
        limits: slots and tokens of the KV cache.
        device: of the logits.
    """

    def __init__(self, limits: Limits, device: torch.device | str = "cpu") -> None:
        slots = limits.num_slots
        self._settings = torch.zeros(
            slots, len(SAMPLING_FIELDS), dtype=torch.float64, device=device
        )
        self._seeds = torch.zeros(slots, dtype=torch.int64, device=device)
        # From numpy: the operating system hands its zeros out when they are first written.
        history = np.zeros((slots, limits.max_tokens), dtype=np.int32)
        self._history = torch.from_numpy(history).to(device)
        self._started: set[int] = set()
        self._penalized: set[int] = set()
        self._processors: dict[int, Processors] = {}

    def sample(self, logits: Tensor, micro_batch: MicroBatch, batch: TokenBatch) -> Tensor:
        """Takes a micro-batch's settings and tokens, and chooses tokens after its segments.

        Args:
            logits: fp32 [E, V], a row for every segment that emits; changed in place.
            micro_batch: settings of the sequences that start, and which segments emit.
            batch: the same tokens on the device.

        Returns:
            int64 [E] on the device; NOT_A_TOKEN where the logits are NaN.

        Raises:
            ProtocolError: the settings of a sequence have not arrived.
        """
        self._start(micro_batch)
        segments = micro_batch.segments.tolist()
        slots = {slot for slot, _, _ in segments}
        if unknown := slots - self._started:
            raise ProtocolError(
                f"control: no sampling settings have arrived for slot {min(unknown)}"
            )
        penalized = not self._penalized.isdisjoint(slots)
        if penalized or not self._processors.keys().isdisjoint(slots):
            assert batch.token_ids is not None
            places = batch.segments.places
            self._history[places[:, 0], places[:, 1]] = batch.token_ids
        if not len(logits):
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        rows = self._list_processors(micro_batch)
        for processors, row, tokens in rows:
            processors.before_penalties(tokens, logits[row : row + 1])
        if penalized:
            ops.penalize_logits(logits, batch.slots, batch.lengths, self._settings, self._history)
        for processors, row, tokens in rows:
            processors.after_penalties(tokens, logits[row : row + 1])
        return ops.sample_tokens(logits, batch.slots, batch.lengths, self._settings, self._seeds)

    def _start(self, micro_batch: MicroBatch) -> None:
        """Takes the settings of the sequences that start."""
        if not len(micro_batch.starts):
            return
        table = micro_batch.settings.clone()
        for row, slot in enumerate(micro_batch.starts[:, 0].tolist()):
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
                    table[row] = torch.tensor(list(settings.values()), dtype=torch.float64)
        slots, device = micro_batch.starts[:, 0], self._settings.device
        self._settings[_send(slots, device)] = _send(table, device)
        self._seeds[_send(slots, device)] = _send(micro_batch.starts[:, 1], device)

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


def _send(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device, by a copy that the host does not wait for."""
    if device.type == "cuda":
        values = values.contiguous().pin_memory()
    return values.to(device, non_blocking=True)
