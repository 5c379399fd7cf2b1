"""Moves micro-batches between neighbouring stages and results from the last to the first.

The only user of point-to-point communication. A thread receives the next messages while the stage
computes (two wait in its queue at most), and two messages may be on their way out, so that neither
side waits for the other's copy. Headers, control data and results travel over gloo; hidden_states
over gloo from CPUs and over NCCL from GPUs, in the same order.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_int8.distributed import RankDied, World, reason
from dist_int8.pipeline import microbatch
from dist_int8.pipeline.microbatch import BadMessage, Kind, Limits, MicroBatch, Result

BUFFERS = 2
TAG = 0


class Transport:
    """This rank's links: from the rank before it, to the rank after it, in a ring.

    Args:
        world: this rank's place and groups; the ring is 0 -> 1 -> ... -> world_size - 1 -> 0.
        limits: the sizes that a header may announce.
        dtype, device: of hidden_states.
    """

    def __init__(
        self,
        world: World,
        limits: Limits,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.source = (world.rank - 1) % world.world_size
        self.target = (world.rank + 1) % world.world_size
        self._groups = world.groups
        self.limits = limits
        self.dtype = dtype
        self.device = device
        self._sent: deque[list[tuple[dist.Work, Tensor]]] = deque()
        self._received: queue.Queue[Any] = queue.Queue(maxsize=BUFFERS)
        receive = self._receive_result if world.rank == 0 else self._receive_micro_batch
        self._thread = threading.Thread(
            target=self._receive_forever, args=(receive,), name="receiver", daemon=True
        )
        self._thread.start()

    def send(self, micro_batch: MicroBatch, hidden_states: Tensor | None) -> None:
        """Starts sending a micro-batch and its hidden_states [T, hidden_size] to the next stage."""
        header, control = microbatch.pack(micro_batch)
        self._send([header, control] + ([] if hidden_states is None else [hidden_states]))

    def send_result(self, result: Result) -> None:
        """Starts sending a result to rank 0."""
        self._send([microbatch.pack_result(result), result.values])

    def next(self, timeout_s: float | None = None) -> Any:
        """The next (micro-batch, hidden_states), or Result on rank 0; None after timeout_s.

        Raises:
            RankDied: the connection to the rank before this one is gone.
            BadMessage: that rank sent something that is no message of this pipeline.
        """
        try:
            item = self._received.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, BadMessage):
            raise item
        if isinstance(item, BaseException):
            raise RankDied(f"lost the connection from rank {self.source}: {reason(item)}")
        if isinstance(item, tuple) and item[2] is not None:
            micro_batch, hidden_states, event = item
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            hidden_states.record_stream(stream)
            return micro_batch, hidden_states
        return item if isinstance(item, Result) else item[:2]

    def flush(self) -> None:
        """Returns when everything sent has left."""
        while self._sent:
            self._wait_for_oldest()

    def join(self, timeout_s: float) -> None:
        """Waits for the receiving thread, which ends when the rank before this one is gone.

        Python must not shut down around it: in torch's C++ code that aborts the process.
        """
        self._thread.join(timeout_s)

    def _send(self, tensors: list[Tensor]) -> None:
        if len(self._sent) >= BUFFERS:
            self._wait_for_oldest()
        try:
            self._sent.append([self._start_send(t.contiguous()) for t in tensors if t.numel()])
        except (RuntimeError, dist.DistError) as error:
            raise self._lost_target(error) from None

    def _start_send(self, tensor: Tensor) -> tuple[dist.Work, Tensor]:
        work = self._groups[tensor.device.type].send([tensor], self.target, TAG)
        return work, tensor  # kept until its copy has left

    def _wait_for_oldest(self) -> None:
        try:
            for work, _ in self._sent.popleft():
                work.wait()
        except (RuntimeError, dist.DistError) as error:
            raise self._lost_target(error) from None

    def _lost_target(self, error: BaseException) -> RankDied:
        return RankDied(f"lost the connection to rank {self.target}: {reason(error)}")

    def _receive_forever(self, receive: Any) -> None:
        try:
            while True:
                item = receive()
                self._received.put(item)
                if isinstance(item, tuple) and item[0].kind == Kind.SHUTDOWN:
                    return
        except BaseException as error:  # whatever ends this thread is raised where it is awaited
            self._received.put(error)

    def _receive_micro_batch(self) -> tuple[MicroBatch, Tensor | None, Any]:
        header = self._receive(torch.empty(microbatch.HEADER_SIZE, dtype=torch.int64))
        size = microbatch.control_size(header, self.limits)
        control = self._receive(torch.empty(size, dtype=torch.int64))
        micro_batch = microbatch.unpack(header, control, self.limits)
        if micro_batch.kind == Kind.SHUTDOWN:
            return micro_batch, None, None
        shape = (micro_batch.num_tokens, self.limits.hidden_size)
        if self.device.type != "cuda":
            return micro_batch, self._receive(torch.empty(shape, dtype=self.dtype)), None
        # A stream of its own lets the copy run beside the stage's kernels.
        stream = self._receive_stream()
        with torch.cuda.stream(stream):
            hidden_states = self._receive(torch.empty(shape, dtype=self.dtype, device=self.device))
            event = torch.cuda.Event()
            event.record(stream)
        return micro_batch, hidden_states, event

    def _receive_stream(self) -> Any:
        if not hasattr(self, "_stream"):
            torch.cuda.set_device(self.device)
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    def _receive_result(self) -> Result:
        header = self._receive(torch.empty(microbatch.HEADER_SIZE, dtype=torch.int64))
        result = microbatch.empty_result(header, self.limits)
        self._receive(result.values)
        return result

    def _receive(self, tensor: Tensor) -> Tensor:
        if tensor.numel():
            self._groups[tensor.device.type].recv([tensor], self.source, TAG).wait()
        return tensor
