"""One stage: its blocks, its KV cache and, on the last one, the sampler."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from dist_int8.models import DecoderStage, TokenBatch
from dist_int8.pipeline.clock import StageClock
from dist_int8.pipeline.graphs import DecodeGraphs, Recorder
from dist_int8.pipeline.kv_cache import KVCache
from dist_int8.pipeline.microbatch import Kind, Limits, MicroBatch, Result


class Sampler(Protocol):
    """Chooses the next tokens on the last stage."""

    def take_settings(self, micro_batch: MicroBatch) -> bool:
        """Takes what a micro-batch brings; returns whether `draw` serves all its sequences."""

    def fill_in(self, batch: TokenBatch) -> TokenBatch:
        """The batch with the newest token of its sequence for each UNKNOWN_TOKEN."""

    def draw(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """int64 [E] on the device from logits fp32 [E, V], without looking at the host."""

    def sample(self, logits: Tensor, micro_batch: MicroBatch, batch: TokenBatch) -> Tensor:
        """The same for sequences with any rules; logits of the segments that emit."""


class Stage:
    """Runs micro-batches through the blocks of one stage.

    Args:
        model: embedding if first, blocks, norm and head if last.
        kv_cache: for the model's blocks.
        sampler: on the last stage only.
    """

    def __init__(self, model: DecoderStage, kv_cache: KVCache, sampler: Sampler | None) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.sampler = sampler
        self.graphs: DecodeGraphs | None = None
        self.device = next(iter(model.state_dict().values())).device
        self.clock = StageClock(self.device)

    def use_graphs(self, limits: Limits, record: Recorder) -> None:
        """Replays decode steps from now on, each recorded when its number of rows first comes."""
        self.graphs = DecodeGraphs(
            record,
            device=self.device,
            max_rows=limits.num_slots,
            hidden=None if self.model.slice.first else (limits.hidden_size, self.model.dtype),
        )

    @torch.inference_mode()
    def run(self, micro_batch: MicroBatch, hidden_states: Tensor | None) -> Tensor | Result:
        """hidden_states [T, hidden_size] for the next stage, or the Result from the last one."""
        if micro_batch.kind == Kind.LOGITS:
            return self._run_logits(micro_batch, hidden_states)
        on_device = self.sampler is None or self.sampler.take_settings(micro_batch)
        if self.graphs is not None and on_device and self.graphs.take(micro_batch, self._compute):
            output = self.graphs.run(micro_batch, hidden_states)
        else:
            output = self._run_eagerly(micro_batch, hidden_states)
        return output if self.sampler is None else self._make_result(micro_batch, output)

    def _run_logits(self, micro_batch: MicroBatch, hidden_states: Tensor | None) -> Tensor | Result:
        token_ids, segments = micro_batch.token_ids, micro_batch.segments
        batch = TokenBatch.from_segments(token_ids, segments, device=self.device)
        self._check(batch)
        output = self.model(batch, hidden_states, self.kv_cache)
        if self.sampler is None:
            return output
        return Result(micro_batch.lane, micro_batch.step, output.float().cpu())

    def _run_eagerly(self, micro_batch: MicroBatch, hidden_states: Tensor | None) -> Tensor:
        """Hidden states, or the tokens int64 [E] of the last stage."""
        token_ids, segments = micro_batch.token_ids, micro_batch.segments
        batch = TokenBatch.of_emitting(token_ids, segments, micro_batch.emits, self.device)
        self._check(batch)
        if self.sampler is None:
            return self.model(batch, hidden_states, self.kv_cache)
        if self.model.slice.first:
            batch = self.sampler.fill_in(batch)
        logits = self.model(batch, hidden_states, self.kv_cache)
        return self.sampler.sample(logits, micro_batch, batch)

    def _compute(self, batch: TokenBatch, hidden_states: Tensor | None) -> Tensor:
        """A whole decode step without a look at the host: what a graph holds."""
        if self.sampler is None:
            return self.model(batch, hidden_states, self.kv_cache)
        if self.model.slice.first:
            batch = self.sampler.fill_in(batch)
        return self.sampler.draw(self.model(batch, hidden_states, self.kv_cache), batch)

    def _check(self, batch: TokenBatch) -> None:
        if self.device.type == "cuda":  # kernels there cannot say what is wrong
            self.model.check(batch, self.kv_cache)

    def _make_result(self, micro_batch: MicroBatch, tokens: Tensor) -> Result:
        """The result of tokens on the device; on a GPU they are still to be computed."""
        result = Result(micro_batch.lane, micro_batch.step, tokens)
        if tokens.is_cuda:
            result.values = torch.empty_like(tokens, device="cpu", pin_memory=True)
            result.values.copy_(tokens, non_blocking=True)
            result.ready = torch.cuda.current_stream(self.device).record_event()
        return result


def give_back_memory() -> None:
    """Returns what stages have freed to the operating system, and to other users of the GPUs."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def keep_num_threads(num_threads: int) -> None:
    """Gives the calling thread's ops this many threads, whatever is set for others later."""
    torch.get_num_threads()  # a thread takes the number of the process when it first needs one
    torch.set_num_threads(num_threads)


def end_idle_threads() -> None:
    """Ends the threads that torch's ops keep for the calling thread; the next op starts them anew.

    With more threads than cores OpenMP lets each of them spin only briefly between two ops, and
    those of the stages are then woken late. Helpers of our own kernels end by themselves.
    """
    with suppress(AttributeError):  # an OpenMP before 5.0
        ctypes.CDLL(None).omp_pause_resource_all(1)  # omp_pause_soft
