"""One stage: its blocks, its KV cache and, on the last one, the sampler."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from dist_int8.models import DecoderStage, TokenBatch
from dist_int8.pipeline.kv_cache import KVCache
from dist_int8.pipeline.microbatch import Kind, MicroBatch, Result


class Sampler(Protocol):
    """Chooses the next tokens on the last stage."""

    def sample(self, logits: Tensor, micro_batch: MicroBatch, batch: TokenBatch) -> Tensor:
        """int64 [E] on the device from logits fp32 [E, V], a row for every segment that emits.

        Also takes the settings and tokens that the micro-batch brings.
        """


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
        self.device = next(iter(model.state_dict().values())).device

    @torch.inference_mode()
    def run(self, micro_batch: MicroBatch, hidden_states: Tensor | None) -> Tensor | Result:
        """hidden_states [T, hidden_size] for the next stage, or the Result from the last one."""
        batch = self._make_batch(micro_batch)
        output = self.model(batch, hidden_states, self.kv_cache)
        if self.sampler is None:
            return output
        if micro_batch.kind == Kind.LOGITS:
            return Result(micro_batch.lane, micro_batch.step, output.float().cpu())
        tokens = self.sampler.sample(output, micro_batch, batch)
        return Result(micro_batch.lane, micro_batch.step, tokens.cpu())

    def _make_batch(self, micro_batch: MicroBatch) -> TokenBatch:
        token_ids, segments = micro_batch.token_ids, micro_batch.segments
        if micro_batch.kind == Kind.LOGITS:
            return TokenBatch.from_segments(token_ids, segments, device=self.device)
        return TokenBatch.of_emitting(token_ids, segments, micro_batch.emits, self.device)


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
