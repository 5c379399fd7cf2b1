"""Real gloo ranks: messages arrive whole and in order, forged ones are refused."""

import multiprocessing
import os
import time
from collections import deque
from datetime import timedelta

import torch

from dist_int8.distributed import rendezvous
from dist_int8.distributed.environment import Launched
from dist_int8.distributed.rendezvous import World
from dist_int8.errors import RankError
from dist_int8.pipeline import wire
from dist_int8.pipeline.microbatch import Kind, Limits, MicroBatch, Result
from dist_int8.pipeline.transport import Transport

LIMITS = Limits(num_slots=4, max_tokens=64, max_rows=32, hidden_size=8, vocab_size=100)
NUM_MESSAGES = 9


def make_world(rank: int, path: str) -> World:
    os.environ["DIST_INT8_FOLDER"] = path
    return rendezvous.join(Launched(rank, 2, rank), False, 60.0)


def make_transport(world: World) -> Transport:
    return Transport(world, LIMITS, torch.float32, torch.device("cpu"))


def message(step: int) -> tuple[MicroBatch, torch.Tensor]:
    count = 1 + step % 5
    micro_batch = MicroBatch(
        Kind.STEP,
        step=step,
        token_ids=torch.full((count,), step),
        segments=torch.tensor([[step % 4, step, count]], dtype=torch.int32),
        emits=torch.ones(1, dtype=torch.int64),
    )
    return micro_batch, torch.full((count, 8), float(step))


class Late:
    """The event of tokens that a GPU still copies while its stage goes on."""

    def synchronize(self) -> None:
        time.sleep(0.02)


def exchange(world: World):
    transport = make_transport(world)
    if world.rank == 0:
        for step in range(NUM_MESSAGES):
            transport.send(*message(step))
        values = [int(transport.next_result(60.0).values) for _ in range(NUM_MESSAGES)]
        transport.send(MicroBatch(Kind.SHUTDOWN), None)
        transport.flush()
        return values
    while True:
        micro_batch, hidden_states = transport.next()
        if micro_batch.kind == Kind.SHUTDOWN:
            transport.flush()
            return "ended"
        expected, expected_hidden = message(micro_batch.step)
        assert torch.equal(hidden_states, expected_hidden)
        assert torch.equal(micro_batch.token_ids, expected.token_ids)
        time.sleep(0.01)  # more messages come than are taken
        values = torch.tensor([micro_batch.step * 10])
        ready = Late() if micro_batch.step % 3 == 0 else None  # logits are there at once
        transport.send_result(Result(0, micro_batch.step, values, ready=ready))


def forge(world: World):
    transport = make_transport(world)
    if world.rank == 0:
        header, _ = wire.pack(message(3)[0])
        header[5] = 2**40  # tokens
        world.groups["cpu"].send([header.view(torch.uint8)], 1, 0).wait()
        transport.send(*message(3))
        transport.flush()
        return "sent"
    micro_batch, _ = transport.next()
    return transport.num_refused, micro_batch.step


def die(world: World):
    transport = make_transport(world)
    if world.rank == 0:
        os._exit(7)
    started = time.monotonic()
    try:
        transport.next()
    except RankError as error:
        return str(error), time.monotonic() - started


def _rank(rank: int, path: str, what, queue) -> None:
    torch.set_num_threads(1)
    queue.put((rank, what(make_world(rank, path))))
    queue.close()
    queue.join_thread()
    os._exit(0)


def run(tmp_path, what, num_results=2):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (str(tmp_path), what, queue)
    ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = dict(queue.get(timeout=60) for _ in range(num_results))
    for process in ranks:
        process.join(10)
        process.kill()
    return results


def test_messages_arrive_whole_and_in_order(tmp_path):
    results = run(tmp_path, exchange)
    assert results == {0: [10 * step for step in range(NUM_MESSAGES)], 1: "ended"}


def test_a_forged_header_is_refused_and_the_next_message_taken(tmp_path, capfd):
    assert run(tmp_path, forge)[1] == (1, 3)
    assert "[rank 1] refused message 1 from rank 0: header" in capfd.readouterr().err


def test_a_closed_connection_names_the_rank(tmp_path):
    text, seconds = run(tmp_path, die, num_results=1)[1]
    assert text.startswith("lost the connection from rank 0") and seconds < 10


class WorkOfNCCL:
    """What torch gives for a send over NCCL: done some time, and nobody needs to wait for it."""

    def __init__(self):
        self.done = self.waited = False

    def is_completed(self):
        return self.done

    def wait(self, timeout):
        assert timeout.total_seconds() == 5.0
        self.waited = True


class OnGPU:
    is_cuda = True


def test_the_host_does_not_wait_for_what_nccl_sends():
    """NCCL needs GPUs: its works are stood in for here."""
    transport = object.__new__(Transport)
    transport._sent, transport._on_gpu, transport.target = deque(), deque(), 1
    transport._send_timeout = timedelta(seconds=5.0)
    transport._sender = None
    works = [WorkOfNCCL() for _ in range(3)]
    for work in works:
        transport._sent.append([(work, OnGPU())])
    transport._wait_for_oldest()
    transport._wait_for_oldest()
    assert [work.waited for work in works] == [False] * 3 and len(transport._on_gpu) == 2
    works[0].done = works[1].done = True
    transport._wait_for_oldest()  # what has left is let go
    assert [work for work, _ in transport._on_gpu] == works[2:]
    transport.flush()
    assert works[2].waited and not transport._on_gpu
