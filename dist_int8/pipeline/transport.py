"""Moves micro-batches between neighbouring stages and results from the last to the first.

The only user of point-to-point communication. A message is one tensor of bytes: header, control
data and, between CPU stages, hidden_states; on GPUs hidden_states follow over NCCL, in the same
order. Two receives are always posted, so a message finds its buffer waiting and leaves the sender
at once: otherwise gloo first asks the receiver, and on busy cores the answer waits for its time
slice (up to 8 ms were measured). gloo's own thread fills the buffers while the stage computes. On
rank 0, which must be able to stop waiting for a result, a thread receives.

A message that no rank of this pipeline sends is refused: it is logged, and the next one is taken.
The last eight bytes depend on the header, so that a truncated message, which leaves an older one in
the rest of the buffer, is refused as well.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_int8.distributed import rendezvous
from dist_int8.distributed.logs import RankLogger
from dist_int8.distributed.owner import let_go_in_children
from dist_int8.distributed.rendezvous import IDLE_TIMEOUT, reason
from dist_int8.distributed.world import World
from dist_int8.errors import ProtocolError, RankError
from dist_int8.pipeline import wire
from dist_int8.pipeline.microbatch import Kind, Limits, MicroBatch, Result
from dist_int8.pipeline.result_sender import ResultSender

BUFFERS = 2
TAG = 0
LOGITS_TAG = 1
ABORT_TAG = 2
ENDS_S = 5.0  # for a thread to end once its connections are closed
HEADER_BYTES = 8 * wire.HEADER_SIZE
END_BYTES = 8
REFUSALS_LOGGED = 32  # later ones are logged at every doubling


class Transport:
    """Links of this rank in the ring: from the previous rank and to the next.

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
        self.rank = world.rank
        self.source = (world.rank - 1) % world.world_size
        self.target = (world.rank + 1) % world.world_size
        self._groups = dict(world.groups)
        self._send_timeout = timedelta(seconds=world.step_timeout_s)
        self._cores = world.cores
        self.limits = limits
        self.dtype = dtype
        self.device = device
        self.num_refused = 0
        self._log = RankLogger(__name__, world.rank)
        self._sent: deque[list[tuple[dist.Work, Tensor]]] = deque()
        self._on_gpu: deque[tuple[dist.Work, Tensor]] = deque()  # under way over NCCL
        self._received: queue.Queue[Result | BaseException] = queue.Queue(maxsize=BUFFERS)
        self._sender: ResultSender | None = None  # of the last rank, on a GPU
        self._stream: Any = None
        self._over_nccl = "cuda" in world.groups
        if world.rank == 0:
            capacity = (2 * wire.MAX_STAGES + limits.num_slots) * 8
        else:
            hidden_bytes = 0 if self._over_nccl else limits.hidden_size * dtype.itemsize
            control_bytes = 8 * wire.max_control_size(limits)
            capacity = control_bytes + limits.max_rows * hidden_bytes
        self._capacity = HEADER_BYTES + capacity + END_BYTES
        self._posted: deque[tuple[dist.Work, Tensor]] = deque()
        try:
            for _ in range(BUFFERS):
                self._post_receive()
        except (RuntimeError, dist.DistError) as error:  # that rank failed while loading its stage
            raise self._lost_source(error) from None
        let_go_in_children(self)
        self._thread: threading.Thread | None = None
        if world.rank == 0:
            self._thread = threading.Thread(
                target=self._receive_results, name="receiver", daemon=True
            )
            self._thread.start()

    def let_go(self) -> None:
        """Nothing of Python's to close in a forked child, which only keeps what torch holds."""

    def send(self, micro_batch: MicroBatch, hidden_states: Tensor | None) -> None:
        """Starts sending a micro-batch and its hidden_states [T, hidden_size] to the next stage."""
        parts = wire.pack(micro_batch)
        if hidden_states is None:
            self._send([_message(*parts)])
        elif self._over_nccl:
            self._send([_message(*parts), hidden_states.contiguous()])
        else:
            self._send([_message(*parts, hidden_states.cpu())])

    def send_result(self, result: Result) -> None:
        """Starts sending a result to rank 0, from a GPU as soon as its values are there."""
        if self._sender is None and result.ready is not None:
            self._sender = ResultSender(self._send_result, self.abort, self._cores)
        if self._sender is None:
            self._send_result(result)
        else:  # those that are ready too: rank 0 takes results in the order of submission
            self._sender.put(result)

    def _send_result(self, result: Result) -> None:
        parts = wire.pack_result(result)
        if result.values.dtype == torch.int64:
            self._send([_message(*parts, result.values)])
        else:
            self._send([_message(*parts)], logits=result.values.contiguous())

    def next(self) -> tuple[MicroBatch, Tensor | None]:
        """The next micro-batch and its hidden_states, on every rank but 0.

        Raises:
            RankError: the connection to the rank before this one is gone.
            ProtocolError: with NCCL, that rank sent no message of this pipeline.
        """
        while True:
            try:
                return self._receive_micro_batch()
            except ProtocolError as error:
                if self._over_nccl:  # its hidden_states would be taken for those of the next one
                    raise
                self.refuse(error)
            except (RuntimeError, dist.DistError) as error:
                if self._sender is not None:  # which closes the connections where it fails
                    self._sender.raise_failure()
                raise self._lost_source(error) from None

    def next_result(self, timeout_s: float) -> Result | None:
        """The next result, on rank 0; None after timeout_s.

        Raises:
            RankError: the connection to the last rank is gone.
        """
        try:
            item = self._received.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, Result):
            return item
        raise self._lost_source(item)

    def flush(self) -> None:
        """Waits until everything sent has left."""
        if self._sender is not None:
            self._sender.finish()
            self._sender = None
        while self._sent:
            self._wait_for_oldest()
        try:
            while self._on_gpu:
                self._on_gpu.popleft()[0].wait(self._send_timeout)
        except (RuntimeError, dist.DistError) as error:
            raise self._lost_target(error) from None

    def abort(self) -> None:
        """Closes the connections to both neighbours: what waits on them here gets RankError.

        gloo closes a connection when an operation on it times out, and has no other way to.
        """
        nothing = torch.empty(1, dtype=torch.uint8)
        for peer in {self.source, self.target}:
            with suppress(RuntimeError, dist.DistError):
                work = self._groups["cpu"].recv([nothing], peer, ABORT_TAG)
                work.wait(timedelta(milliseconds=1))
        if self._sender is not None:
            self._sender.close()
        with suppress(queue.Empty):
            while True:  # the receiving thread must not wait for room
                self._received.get_nowait()

    def join(self, timeout_s: float) -> None:
        """Waits for rank 0's receiving thread, which ends when the last rank is gone.

        Python must not shut down around it: in torch's C++ code that aborts the process.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():  # that rank is stopped or cut off
                self.abort()
                self._thread.join(ENDS_S)

    def _send(self, tensors: list[Tensor], logits: Tensor | None = None) -> None:
        if len(self._sent) >= BUFFERS:
            self._wait_for_oldest()
        try:
            sent = [self._start_send(tensor, TAG) for tensor in tensors]
            if logits is not None:
                sent.append(self._start_send(logits, LOGITS_TAG))
        except (RuntimeError, dist.DistError) as error:
            raise self._lost_target(error) from None
        self._sent.append(sent)

    def _start_send(self, tensor: Tensor, tag: int) -> tuple[dist.Work, Tensor]:
        work = self._groups[tensor.device.type].send([tensor], self.target, tag)
        return work, tensor  # kept until its copy has left

    def _wait_for_oldest(self) -> None:
        """Waits until the oldest message has left, but for what NCCL sends: a GPU does that.

        Such a tensor is kept until it has left. Its header, which the next rank takes first, is
        what holds a fast stage back.
        """
        try:
            for work, tensor in self._sent.popleft():
                if tensor.is_cuda:
                    self._on_gpu.append((work, tensor))
                else:
                    work.wait(self._send_timeout)
            while self._on_gpu and self._on_gpu[0][0].is_completed():
                self._on_gpu.popleft()
        except (RuntimeError, dist.DistError) as error:
            raise self._lost_target(error) from None

    def _lost_target(self, error: BaseException) -> RankError:
        message = f"lost the connection to rank {self.target}: {reason(error)}"
        return RankError(message, self.target)

    def _lost_source(self, error: BaseException) -> RankError:
        message = f"lost the connection from rank {self.source}: {reason(error)}"
        return RankError(message, self.source)

    def _receive_results(self) -> None:
        rendezvous.stay_on(self._cores)
        try:
            while True:
                try:
                    self._received.put(self._receive_result())
                except ProtocolError as error:
                    self.refuse(error)
        except BaseException as error:  # whatever ends this thread is raised where it is awaited
            self._received.put(error.with_traceback(None))  # its frames refer to this

    def refuse(self, error: ProtocolError) -> None:
        """Logs that a message was dropped, and why."""
        self.num_refused += 1
        count = self.num_refused
        if count <= REFUSALS_LOGGED or count & (count - 1) == 0:  # a flood must not fill the log
            self._log.warning("refused message %d from rank %d: %s", count, self.source, error)

    def _post_receive(self) -> None:
        buffer = torch.empty(self._capacity, dtype=torch.uint8)
        self._posted.append((self._groups["cpu"].recv([buffer], self.source, TAG), buffer))

    def _next_message(self) -> Tensor:
        """The next message's bytes; another receive is posted in its place."""
        work, buffer = self._posted.popleft()
        work.wait(IDLE_TIMEOUT)
        self._post_receive()
        return buffer

    def _receive_micro_batch(self) -> tuple[MicroBatch, Tensor | None]:
        message = self._next_message()
        header = message[:HEADER_BYTES].view(torch.int64)
        end = HEADER_BYTES + 8 * wire.control_size(header, self.limits)
        control = message[HEADER_BYTES:end].view(torch.int64)
        micro_batch = wire.unpack(header, control, self.limits)
        if micro_batch.kind == Kind.SHUTDOWN:
            _check_end(message, end, micro_batch.step)
            return micro_batch, None
        shape = (micro_batch.num_tokens, self.limits.hidden_size)
        if self._over_nccl:
            _check_end(message, end, micro_batch.step)
            return micro_batch, self._receive_on_gpu(shape)
        num_bytes = shape[0] * shape[1] * self.dtype.itemsize
        _check_end(message, end + num_bytes, micro_batch.step)
        hidden_states = message[end : end + num_bytes].view(self.dtype).view(shape)
        return micro_batch, hidden_states.to(self.device)

    def _receive_on_gpu(self, shape: tuple[int, int]) -> Tensor:
        """hidden_states, which what the current stream runs from now on may read.

        A stream of its own lets the copy run beside the kernels that the stage started before.
        """
        if self._stream is None:
            torch.cuda.set_device(self.device)
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            hidden_states = torch.empty(shape, dtype=self.dtype, device=self.device)
            self._groups["cuda"].recv([hidden_states], self.source, TAG).wait()
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self._stream)
        hidden_states.record_stream(stream)
        return hidden_states

    def _receive_result(self) -> Result:
        message = self._next_message()
        header = message[:HEADER_BYTES].view(torch.int64)
        start = HEADER_BYTES + 8 * wire.result_spans_size(header)
        spans = message[HEADER_BYTES:start].view(torch.int64)
        result = wire.empty_result(header, spans, self.limits)
        if result.values.dtype == torch.int64:
            end = start + 8 * result.values.numel()
            _check_end(message, end, result.step)
            result.values = message[start:end].view(torch.int64)
            wire.check_tokens(result.values, self.limits)
        else:
            _check_end(message, start, result.step)
            self._groups["cpu"].recv([result.values], self.source, LOGITS_TAG).wait(IDLE_TIMEOUT)
        return result


def _message(header: Tensor, *parts: Tensor) -> Tensor:
    """The bytes of one message, with its end mark."""
    tensors = (header, *parts, wire.end_mark(header))
    return torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors])


def _check_end(message: Tensor, end: int, step: int) -> None:
    """Raises ProtocolError if the end mark of this step is not at byte `end`."""
    mark = int.from_bytes(message[end : end + END_BYTES].numpy(), "little")
    if mark != wire.MAGIC ^ step:
        raise ProtocolError(f"message: step {step} must end at byte {end}; it is truncated")
