"""Decode steps of a stage as graphs: recorded once for a number of rows, then replayed.

A decode step of a small model is hundreds of launches, each of which takes the host longer than the
kernel takes the GPU. A graph is launched as a whole. It reads and writes the same memory in every
replay, so what differs from step to step lies in one buffer:

    micro-batch -> pinned memory -> [slots | lengths | token ids | places] --replay--> output
                     one copy          static, rows up to the bucket's       clone of its rows

Rows that only fill up a bucket belong to a slot that no sequence has: attention leaves the KV cache
alone for it, and the sampler has a row of its own. A row's result does not depend on how many
others there are, but for a head in 16 bits, which is cuBLAS'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_int8.models import TokenBatch
from dist_int8.pipeline.microbatch import MicroBatch

_log = logging.getLogger(__name__)

Replay = Callable[[], object]
Compute = Callable[[TokenBatch, Tensor | None], Tensor]
Recorder = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records a function without arguments; returns what runs it again, and what it wrote its result
to."""


def list_buckets(max_rows: int) -> list[int]:
    """Numbers of rows that steps are filled up to: 1, 2, 4, then multiples of 8, and max_rows."""
    return sorted({*(b for b in (1, 2, 4) if b < max_rows), *range(8, max_rows, 8), max_rows})


@dataclass
class _Graph:
    """One bucket's graph and the memory that it reads and writes."""

    inputs: Tensor  # int32, the parts of a TokenBatch
    hidden_states: Tensor | None
    replay: Replay
    output: Tensor


class DecodeGraphs:
    """The graphs of one stage, recorded when a step of their number of rows first comes.

    Args:
        record: what records it.
        device: of the stage.
        max_rows: the most rows of a step: the number of slots.
        hidden: (size, dtype) of hidden states; None on the first stage.
    """

    def __init__(
        self,
        record: Recorder,
        device: torch.device,
        max_rows: int,
        hidden: tuple[int, torch.dtype] | None,
    ) -> None:
        self._record = record
        self._device = device
        self._hidden = hidden
        self._no_slot = max_rows  # the slot after the last one
        self._buckets = list_buckets(max_rows)
        self._graphs: dict[int, _Graph] = {}
        self._fails = False

    def take(self, micro_batch: MicroBatch, compute: Compute) -> bool:
        """Whether `run` serves a micro-batch: a decode step, whose graph is recorded if need be.

        That is one token of each sequence, all of which emit. Where recording fails nothing is
        taken any more, and a warning says so.

        Args:
            micro_batch: any.
            compute: what is recorded, of a batch and hidden states [rows, hidden_size] (None on the
                first stage): hidden states or tokens, all rows of it; without a look at the host.
                Not kept: it refers to the stage.
        """
        is_step = micro_batch.segments.shape[0] == micro_batch.num_tokens
        if self._fails or not (is_step and micro_batch.emits.numpy().all()):
            return False
        # The largest first: the others then find room in what it has taken.
        for bucket in (self._buckets[-1], self._find_bucket(micro_batch)):
            try:
                if bucket not in self._graphs:
                    self._graphs[bucket] = self._make(bucket, compute)
            except RuntimeError as error:  # such as an op that cannot be captured
                self._fails = True
                _log.warning(
                    "decode steps cannot be recorded and are launched one by one: %s", error
                )
                return False
        return True

    def run(self, micro_batch: MicroBatch, hidden_states: Tensor | None) -> Tensor:
        """The result of a step that `take` has taken, without the rows that fill up."""
        num_rows, bucket = micro_batch.num_tokens, self._find_bucket(micro_batch)
        graph = self._graphs[bucket]
        self._upload(self._pack(micro_batch, bucket), graph.inputs)
        if graph.hidden_states is not None:
            assert hidden_states is not None
            graph.hidden_states.narrow(0, 0, num_rows).copy_(hidden_states, non_blocking=True)
        graph.replay()
        return graph.output.narrow(0, 0, num_rows).clone()

    def _find_bucket(self, micro_batch: MicroBatch) -> int:
        return next(b for b in self._buckets if b >= micro_batch.num_tokens)

    def _make(self, bucket: int, compute: Compute) -> _Graph:
        rows = np.tile(np.array([self._no_slot, 0, 1], np.int32), (bucket, 1))
        parts, make_batch = TokenBatch.parts_of(np.zeros(bucket, np.int32), rows, None)
        inputs = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
        inputs = inputs.to(self._device)
        batch = make_batch(list(inputs.split([part.size for part in parts])))
        hidden_states = None
        if self._hidden is not None:
            size, dtype = self._hidden
            hidden_states = torch.zeros(bucket, size, dtype=dtype, device=self._device)
        replay, output = self._record(lambda: compute(batch, hidden_states))
        return _Graph(inputs, hidden_states, replay, output)

    def _pack(self, micro_batch: MicroBatch, bucket: int) -> Tensor:
        """What `inputs` of the bucket's graph holds for this step."""
        num_rows = micro_batch.num_tokens
        rows = np.empty((bucket, 3), np.int32)
        rows[:num_rows] = micro_batch.segments.numpy()
        rows[num_rows:] = (self._no_slot, 0, 1)
        ids = np.zeros(bucket, np.int32)
        ids[:num_rows] = micro_batch.token_ids.numpy()
        parts, _ = TokenBatch.parts_of(ids, rows, None)
        return torch.from_numpy(np.concatenate([part.ravel() for part in parts]))

    def _upload(self, values: Tensor, to: Tensor) -> None:
        """Copies, without a wait: the pinned memory is given away again once the copy is done."""
        to.copy_(values.pin_memory() if to.is_cuda else values, non_blocking=True)


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            work()  # libraries set themselves up at their first call
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other stages of this process may launch what they like meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = work()
        return graph.replay, output
