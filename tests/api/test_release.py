"""What a handle holds is gone with it, or after shutdown(), without a garbage collection."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import weakref

import psutil
import pytest
import torch
from torch import nn

import dist_int8
from dist_int8.errors import RankError

OPTIONS = {"progress": False, "threads_per_stage": 1, "max_tokens": 96}
KINDS = {
    "one stage": {"devices": ["cpu"]},
    "two ranks": {"devices": ["cpu"] * 2},
    "two threads": {"devices": ["cpu"] * 2, "in_process": True},
}


@pytest.fixture(params=KINDS)
def load(request, tiny_llama):
    return lambda **settings: dist_int8.load(
        tiny_llama, **OPTIONS, **KINDS[request.param] | settings
    )


@pytest.fixture
def without_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def count_resources():
    """Threads, children and descriptors of this process."""
    return (
        len(threading.enumerate()),
        len(psutil.Process().children()),
        len(os.listdir("/proc/self/fd")),
    )


def count_native_threads():
    return len(os.listdir("/proc/self/task"))


def storages():
    """The storages of every tensor that Python knows."""
    found = set()
    for thing in gc.get_objects():
        with contextlib.suppress(ReferenceError, RuntimeError):
            if type(thing) in (torch.Tensor, nn.Parameter) and not thing.is_meta:
                found.add((thing.untyped_storage().data_ptr(), thing.untyped_storage().nbytes()))
    return found


def use(model):
    model.generate("abc", max_new_tokens=3)
    next(model.iter_logits([[1, 2, 3], [4]]))
    stage = model._engine.pipeline.stage
    return [weakref.ref(stage), weakref.ref(stage.model), weakref.ref(stage.kv_cache)]


def test_nothing_is_left_after_shutdown(load, without_gc):
    check_that_nothing_is_left(load, "shutdown")


def test_nothing_is_left_when_the_last_reference_goes(load, without_gc):
    check_that_nothing_is_left(load, "replaced")


@pytest.mark.parametrize("ending", ["del", "with", "drain"])
def test_nothing_is_left_after_other_ends(tiny_llama, without_gc, ending):
    def load():
        return dist_int8.load(tiny_llama, **OPTIONS, **KINDS["two threads"])

    check_that_nothing_is_left(load, ending)


def check_that_nothing_is_left(load, ending):
    use(load())  # what is made once and for all
    before, native, held = count_resources(), count_native_threads(), storages()
    model = load()
    watched = use(model)
    assert all(reference() is not None for reference in watched)
    if ending == "with":
        with model:
            pass
    elif ending == "del":
        del model
    elif ending == "replaced":
        model = load()
        assert all(reference() is None for reference in watched)
        model = None
    else:
        getattr(model, ending)()
    assert all(reference() is None for reference in watched)
    assert storages() - held == set()
    assert count_resources() == before
    assert count_native_threads() <= native


def test_nothing_is_left_while_a_traceback_refers_to_the_handle(load, without_gc):
    model = load()
    watched = use(model)

    def fail(token):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as kept:
        model.generate("abc", max_new_tokens=3, on_token=fail)
    stream = model.generate("abc", max_new_tokens=30, stream=True)
    pieces = model.iter_logits([[1, 2, 3], [4]])
    next(stream), next(pieces)
    model.shutdown()
    assert all(reference() is None for reference in watched)
    assert kept is not None and model.stages and model.trace.last_step > 0


def test_a_traceback_does_not_keep_the_handle(load, without_gc):
    """An interrupted cell, and the one that loads the model run again."""
    model = load()
    watched = use(model)

    def fail(token):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as kept:
        model.generate("abc", max_new_tokens=3, on_token=fail)
    with pytest.raises(ZeroDivisionError) as kept_too:
        list(model.run(1 // 0 for _ in "a"))
    del model
    assert all(reference() is None for reference in watched)
    assert kept is not None and kept_too is not None


def test_nothing_is_left_of_a_model_that_failed(load, without_gc, monkeypatch):
    before = count_resources()
    model = load()
    watched = use(model)
    stage = type(model._engine.pipeline.stage)
    run = stage.run

    def fail(self, *args):
        run(self, *args)
        raise MemoryError("no room")

    monkeypatch.setattr(stage, "run", fail)
    with pytest.raises((MemoryError, RankError)) as kept:
        model.generate("abc", max_new_tokens=3)
    assert all(reference() is None for reference in watched) and kept is not None
    with pytest.raises((dist_int8.ShuttingDownError, RankError)):
        model.generate("abc", max_new_tokens=3)
    monkeypatch.undo()
    del model
    assert count_resources() == before


def test_nothing_is_left_of_a_load_that_fails(load, without_gc, monkeypatch):
    use(load())
    before, held = count_resources(), storages()

    def fail(*args, **kwargs):
        raise MemoryError("no room for the engine")

    monkeypatch.setattr("dist_int8.api.start.Engine", fail)
    with pytest.raises(MemoryError) as kept:
        load()
    assert storages() - held == set() and kept is not None
    assert count_resources() == before


def test_what_belongs_to_the_session_is_as_it_was(load):
    """Its threads, random numbers, cores, gradients, dtype, filters, handlers and environment."""
    import logging
    import random
    import signal
    import warnings

    import numpy

    load().shutdown()  # what is imported then, and the interface named to NCCL, stay
    torch.set_num_threads(2)
    before = None
    for is_loaded in (False, True):
        if is_loaded:
            load().generate("abc", max_new_tokens=3, temperature=1.0)
        state = (
            torch.get_num_threads(),
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
            os.sched_getaffinity(0),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            list(warnings.filters),
            [signal.getsignal(number) for number in signal.valid_signals()],
            dict(os.environ),
            (logging.getLogger().level, list(logging.getLogger().handlers)),
            os.getcwd(),
            sys.excepthook,
            threading.excepthook,
        )
        before = before or state
        differing = [k for k, (a, b) in enumerate(zip(before, state, strict=True)) if a != b]
        assert not differing
    with torch.random.fork_rng():
        assert torch.rand(1).requires_grad is False
    torch.set_num_threads(1)


def test_models_are_loaded_in_threads_beside_other_modules(load):
    wanted = load().generate("abc", max_new_tokens=5)[0].token_ids
    answers, devices, done = [], set(), threading.Event()

    def answer():
        with load() as model:
            answers.append(model.generate("abc", max_new_tokens=5)[0].token_ids)

    def make_modules():
        while not done.is_set():
            devices.add(nn.Linear(3, 3).weight.device.type)

    threads = [threading.Thread(target=answer) for _ in range(2)]
    others = threading.Thread(target=make_modules)
    for thread in [others, *threads]:
        thread.start()
    for thread in threads:
        thread.join(120)
    done.set()
    others.join()
    assert answers == [wanted] * 2 and devices == {"cpu"}


def test_the_first_load_of_a_process_is_freed_without_a_collection(tiny_llama):
    """Everything is imported under its frames, and some imports leave them in a cycle."""
    code = """
import gc, sys, weakref
import dist_int8
gc.disable()
def use():
    model = dist_int8.load(sys.argv[1], devices=["cpu"], progress=False)
    model.generate([[1]], max_new_tokens=1)
    return weakref.ref(model), weakref.ref(model._engine.pipeline.stage)
print([ref() for ref in use()])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tiny_llama)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[None, None]"
