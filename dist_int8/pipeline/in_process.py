"""Several stages in one process, one thread per stage: micro-batches pass by reference, in a ring.

For a machine whose GPUs one process drives, without ranks, sockets or NCCL: hidden_states are
copied from device to device on streams, and the next stage's stream, not its thread, waits for the
copy. On CPUs nothing is copied at all. The stages share the GIL, which threads
that run kernels rarely hold. Same interface as `transport.Transport`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_int8.distributed import rendezvous
from dist_int8.errors import ProtocolError, RankError
from dist_int8.pipeline.microbatch import Kind, MicroBatch, Result
from dist_int8.pipeline.stage import keep_num_threads
from dist_int8.pipeline.transport import BUFFERS


@dataclass(frozen=True)
class _Message:
    """A message between stages; on a GPU `ready` is recorded after the copy of hidden_states."""

    content: MicroBatch | Result | RankError
    hidden_states: Tensor | None = None
    ready: Any = None


class InProcessTransport:
    """The links of one stage to those before and after it.

    Args:
        stage: number of the stage.
        devices: of all stages.
        boxes: one queue per stage with its pending messages; the first one holds results.
        threads: of the stages, on the first one.
    """

    def __init__(
        self,
        stage: int,
        devices: Sequence[torch.device],
        boxes: Sequence[queue.Queue[_Message]],
        threads: Sequence[threading.Thread] = (),
    ) -> None:
        self.stage = stage
        self._next = (stage + 1) % len(devices)
        self._device = devices[stage]
        self._target = devices[self._next]
        self._boxes = boxes
        self._threads = threads

    def send(self, micro_batch: MicroBatch, hidden_states: Tensor | None) -> None:
        """Passes a micro-batch and its hidden_states [T, hidden_size] on, copied by the device.

        Blocks while two messages wait there already, so that a fast stage does not run ahead.
        """
        ready = None
        if hidden_states is not None and hidden_states.device != self._target:
            to_gpu = self._target.type == "cuda"
            hidden_states = hidden_states.to(self._target, non_blocking=to_gpu)
            if to_gpu:  # torch copies on the source's stream, or on the target's from the CPU
                copied_on = self._device if self._device.type == "cuda" else self._target
                ready = torch.cuda.current_stream(copied_on).record_event()
        self._boxes[self._next].put(_Message(micro_batch, hidden_states, ready))

    def send_result(self, result: Result) -> None:
        """Passes a result to stage 0."""
        self._boxes[0].put(_Message(result))

    def next(self) -> tuple[MicroBatch, Tensor | None]:
        """The next micro-batch and its hidden_states, on every stage but 0."""
        message = self._boxes[self.stage].get()
        assert isinstance(message.content, MicroBatch)
        if message.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(message.ready)
            assert message.hidden_states is not None
            message.hidden_states.record_stream(stream)
        return message.content, message.hidden_states

    def next_result(self, timeout_s: float) -> Result | None:
        """The next result, on stage 0; None after timeout_s.

        Raises:
            RankError: another stage failed.
        """
        try:
            content = self._boxes[0].get(timeout=timeout_s).content
        except queue.Empty:
            return None
        if isinstance(content, RankError):
            raise content
        assert isinstance(content, Result)
        return content

    def flush(self) -> None:
        """Nothing waits here: what was sent is with the next stage."""

    def join(self, timeout_s: float) -> None:
        """Asks the stages to end, should they not have been asked, and waits for their threads."""
        for thread, box in zip(self._threads, self._boxes[1:], strict=True):
            if thread.is_alive():
                with suppress(queue.Full):  # a stage that hangs; its thread ends with the process
                    box.put(_Message(MicroBatch(Kind.SHUTDOWN)), timeout=timeout_s)
        for thread in self._threads:
            thread.join(timeout_s)

    def abort(self) -> None:
        """Nothing to close: what waits here is a thread of this process."""

    def refuse(self, error: ProtocolError) -> None:
        """Nothing forged comes from this process: a bad message is a mistake of ours."""
        raise error


def connect(
    devices: Sequence[torch.device],
    serve: Callable[[int, InProcessTransport], None],
    cores: Sequence[frozenset[int]],
) -> InProcessTransport:
    """Starts a thread for every stage but the first and returns the links of the first.

    Args:
        devices: of each stage.
        serve: runs a stage until shutdown; an exception that it raises ends the pipeline.
        cores: CPU cores of each stage; empty: any.
    """
    # results are never more than micro-batches in flight, so that the last stage need not wait
    boxes: list[queue.Queue[_Message]] = [queue.Queue()]
    boxes += [queue.Queue(maxsize=BUFFERS) for _ in devices[1:]]

    num_threads = torch.get_num_threads()
    begun = threading.Semaphore(0)

    def run(stage: int) -> None:
        rendezvous.stay_on(cores[stage])
        keep_num_threads(num_threads)
        begun.release()
        if devices[stage].type == "cuda":
            torch.cuda.set_device(devices[stage])
        try:
            serve(stage, InProcessTransport(stage, devices, boxes))
        except BaseException as error:
            text = f"rank {stage} failed: {type(error).__name__}: {error}"
            boxes[0].put(_Message(RankError(text, stage)))

    threads = [
        threading.Thread(target=run, args=(stage,), name=f"stage {stage}", daemon=True)
        for stage in range(1, len(devices))
    ]
    for thread in threads:
        thread.start()
        begun.acquire()
    return InProcessTransport(0, devices, boxes, threads)
