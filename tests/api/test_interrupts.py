"""Whatever interrupts a call, a signal handler or the caller itself, the handle goes on."""

import contextlib
import gc
import random
import signal
import threading
import time

import psutil
import pytest
import torch

import dist_int8
from dist_int8.errors import RankError, ShuttingDownError

PROMPTS = [[5, 9, 2, 7], [11, 3], list(range(40, 75)), [8]]
OPTIONS = {"progress": False, "threads_per_stage": 1, "max_tokens": 96, "prefill_chunk": 16}
KINDS = {
    "one stage": {"devices": ["cpu"]},
    "two ranks": {"devices": ["cpu"] * 2},
    "two threads": {"devices": ["cpu"] * 2, "in_process": True},
}
NUM_INTERRUPTS = 60


class Interrupted(BaseException):
    """What the signal handler raises, like KeyboardInterrupt."""


def load(folder, kind, **settings):
    return dist_int8.load(folder, **OPTIONS, max_sequences=3, **KINDS[kind], **settings)


@pytest.fixture
def left_behind():
    """Lists threads and processes of ours that were not there when the test began."""

    def ours():
        threads = {t for t in threading.enumerate() if t.name.startswith(("stage ", "dist_int8"))}
        return threads | set(psutil.Process().children())

    before = ours()
    return lambda: ours() - before


@pytest.fixture(scope="module", params=KINDS)
def model(request, tiny_llama):
    with load(tiny_llama, request.param) as model:
        yield model


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """Tokens of every prompt, and logits, from a model that nothing interrupts."""
    with load(tiny_llama, "one stage") as model:
        answers = model.generate(PROMPTS, max_new_tokens=8)
        return [a.token_ids for a in answers], [model.logits([p])[0] for p in PROMPTS]


@pytest.fixture
def interrupt_after():
    """Sets the time after which the handler of SIGALRM raises, once."""

    def raise_it(signum, frame):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, raise_it)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def generate(model):
    return [answer.token_ids for answer in model.generate(PROMPTS, max_new_tokens=8)]


def has_right_logits(model, expected):
    pieces = list(model.iter_logits(PROMPTS))
    assert sum(len(values) for _, _, values in pieces) == sum(map(len, PROMPTS))
    return all(
        torch.equal(values, expected[index][start : start + len(values)])
        for index, start, values in pieces
    )


def finish_steps(model):
    """Takes what is still under way of calls that were interrupted."""
    while model._engine.step():
        pass


def half_a_stream(model):
    for _, _ in zip(range(9), model.generate(PROMPTS, max_new_tokens=8, stream=True), strict=False):
        pass


def test_interrupts_at_any_moment_lose_nothing(model, expected, interrupt_after):
    tokens, logits = expected
    works = [
        generate,
        half_a_stream,
        lambda model: list(model.iter_logits(PROMPTS)),
        lambda model: next(model.iter_logits(PROMPTS)),
    ]
    durations = []
    for work in works:
        begin = time.perf_counter()
        work(model)
        durations.append(time.perf_counter() - begin)
    draw = random.Random(0)
    num_interrupted = 0
    for index in range(NUM_INTERRUPTS):
        work, duration = works[index % len(works)], durations[index % len(works)]
        try:
            interrupt_after(draw.uniform(0, duration))
            work(model)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            num_interrupted += 1
        if index % 5 == 0:
            assert generate(model) == tokens
        if index % 20 == 0:
            assert has_right_logits(model, logits)
    assert num_interrupted > NUM_INTERRUPTS / 4
    assert generate(model) == tokens and has_right_logits(model, logits)
    finish_steps(model)
    assert len(model._engine._scheduler.free_slots) == 3 and model._engine.num_running == 0


def test_a_call_beside_unfinished_logits(model, expected):
    tokens, logits = expected
    pieces = model.iter_logits(PROMPTS)
    seen = [next(pieces)]
    assert generate(model) == tokens  # takes the slots away
    seen.append(next(pieces))
    stream = model.generate(PROMPTS[2], max_new_tokens=8, stream=True)
    first = next(stream)
    other = model.iter_logits(PROMPTS)  # finds fewer slots
    seen.append(next(pieces))
    assert has_right_logits(model, logits)
    assert [first.token_id, *(token.token_id for token in stream)] == tokens[2]
    assert len(list(other)) > 0
    seen += pieces
    positions = [(i, start + k) for i, start, values in seen for k in range(len(values))]
    assert positions == [(i, k) for i, prompt in enumerate(PROMPTS) for k in range(len(prompt))]
    for index, start, values in seen:
        assert torch.equal(values, logits[index][start : start + len(values)])


def test_the_old_name_of_iter_logits_works(model):
    with pytest.deprecated_call(match="iter_logits"):
        pieces = model.logits_of(PROMPTS[:1])
    assert next(pieces)[:2] == (0, 0)
    pieces.close()


def test_on_token_may_raise_or_call_the_model(model, expected):
    def fail(token):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as kept:  # its traceback refers to the stream
        model.generate(PROMPTS, max_new_tokens=8, on_token=fail)
    finish_steps(model)
    assert kept is not None and model._engine.num_running == 0
    inner = []
    outer = model.generate(
        PROMPTS[0], max_new_tokens=3, on_token=lambda token: inner.append(generate(model))
    )
    assert outer[0].token_ids == expected[0][0][:3] and inner == [expected[0]] * 3


def test_an_abandoned_iterator_frees_its_slots(model, expected):
    streams = [model.generate(PROMPTS, max_new_tokens=50, stream=True) for _ in range(2)]
    for stream in streams:
        next(stream)
    pieces = model.iter_logits(PROMPTS)
    next(pieces)
    del stream, streams, pieces
    assert generate(model) == expected[0]
    finish_steps(model)
    assert len(model._engine._scheduler.free_slots) == 3


def test_an_iterator_may_change_threads(model, expected):
    stream = model.generate(PROMPTS[0], max_new_tokens=8, stream=True)
    pieces = model.iter_logits(PROMPTS)
    seen, counts = [next(stream)], [len(next(pieces)[2])]

    def take_the_rest():
        seen.extend(stream)
        counts.extend(len(values) for _, _, values in pieces)

    thread = threading.Thread(target=take_the_rest)
    thread.start()
    thread.join(60)
    assert [token.token_id for token in seen] == expected[0][0]
    assert sum(counts) == sum(map(len, PROMPTS))


def test_an_iterator_keeps_its_handle(tiny_llama, expected, left_behind):
    stream = load(tiny_llama, "two ranks").generate(PROMPTS[0], max_new_tokens=8, stream=True)
    gc.collect()
    assert [token.token_id for token in stream] == expected[0][0]
    del stream
    assert not left_behind()


@pytest.mark.parametrize("kind", KINDS)
def test_shutdown_that_is_interrupted_still_ends_everything(
    tiny_llama, interrupt_after, left_behind, kind
):
    for seconds in (0, 0.005):
        model = load(tiny_llama, kind)
        stream = model.generate(PROMPTS, max_new_tokens=50, stream=True)
        next(stream)
        with contextlib.suppress(Interrupted):
            interrupt_after(seconds)
            model.shutdown()
            signal.setitimer(signal.ITIMER_REAL, 0)
        model.shutdown()  # waits for the first
        with pytest.raises(ShuttingDownError):
            list(stream)
        assert not left_behind()


@pytest.mark.parametrize("kind", KINDS)
def test_load_that_is_interrupted_leaves_nothing_running(
    tiny_llama, interrupt_after, left_behind, kind
):
    begin = time.perf_counter()
    load(tiny_llama, kind).shutdown()
    duration = time.perf_counter() - begin
    for share in (0.1, 0.4, 0.8):
        try:
            interrupt_after(share * duration)
            model = load(tiny_llama, kind)
            signal.setitimer(signal.ITIMER_REAL, 0)
            model.shutdown()
        except Interrupted:
            pass
        model = None  # its thread ends by itself, a moment later
        deadline = time.monotonic() + 10
        while left_behind() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left_behind()


def test_shutdown_does_not_wait_for_a_stage_that_hangs(tiny_llama, monkeypatch, left_behind):
    monkeypatch.setattr("dist_int8.engine.engine.CLOSE_S", 0.5)
    model = load(tiny_llama, "two ranks")
    (child,) = (item for item in left_behind() if isinstance(item, psutil.Process))
    child.suspend()
    stream = model.generate(PROMPTS, max_new_tokens=8, stream=True)

    def wait_for_it():
        with pytest.raises(RankError):
            list(stream)

    waiting = threading.Thread(target=wait_for_it)
    waiting.start()
    time.sleep(0.2)
    begin = time.monotonic()
    model.shutdown()
    assert time.monotonic() - begin < 20 and not left_behind()
    waiting.join(10)
    assert not waiting.is_alive()
