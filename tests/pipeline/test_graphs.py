"""Decode steps as graphs, two steps in flight: the tokens of a model that has neither.

The graphs here are as strict as CUDA graphs, on CPUs: every op that reaches torch's dispatcher
while a step is recorded is written down with its very arguments, and a replay runs these ops again
on the same memory, and nothing else. A Python value that was read meanwhile is then as old as the
recording.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dist_int8
from dist_int8.engine.sampling import TokenSampler
from dist_int8.engine.scheduler import Scheduler
from dist_int8.pipeline.graphs import DecodeGraphs, list_buckets
from dist_int8.pipeline.kv_cache import KVCache
from dist_int8.pipeline.microbatch import Kind, MicroBatch

OPTIONS = {"progress": False, "devices": ["cpu"], "max_tokens": 96, "max_sequences": 12}
LENGTHS = (1, 37, 5, 18, 60, 3, 2, 9, 4, 4, 30, 8, 11, 20)  # more than slots, chunks of 16
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.1}


class _Recording(TorchDispatchMode):
    """Writes down (op, args, kwargs, results that have memory of their own)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = op(*args, **kwargs)
        given = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        memory = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _real(t)}
        own = [
            t
            for t in tree_leaves(results)
            if _real(t) and id(t) not in given and t.untyped_storage().data_ptr() not in memory
        ]
        self.calls.append((op, args, kwargs, own))
        return results


def _real(value) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


class FakeRecorder:
    """A `Recorder` for `pipeline.graphs`.

    Attributes:
        num_recorded: graphs recorded.
        num_replayed: replays of all of them.
    """

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0

    def __call__(self, work: Callable[[], Tensor]):
        self.num_recorded += 1
        with _Recording() as recording:
            output = work()

        def replay() -> None:
            self.num_replayed += 1
            for op, args, kwargs, own in recording.calls:
                results = op(*args, **kwargs)
                fresh = [t for t in tree_leaves(results) if _real(t)]
                if own:
                    assert len(fresh) >= len(own)
                    for to, value in zip(own, fresh, strict=False):
                        to.copy_(value)

        return torch.inference_mode()(replay), output


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 288, (n,), generator=generator).tolist() for n in lengths]


def answers(model, asked, **settings):
    settings = {"max_new_tokens": 20, "seed": 5} | settings
    return [(a.token_ids, a.finish_reason) for a in model.generate(asked, **settings)]


def make_ready(model, graphs=True, ahead=True):
    """Gives a model on a CPU what one on a GPU has; returns the recorder."""
    engine = model._engine
    stage, limits = engine.pipeline.stage, engine.limits
    spec = model._spec.blocks[0]
    stage.kv_cache = KVCache(  # with a slot that rows without a sequence may write to
        len(stage.model.blocks),
        limits.num_slots + 1,
        spec.num_kv_heads,
        spec.head_dim,
        limits.max_tokens,
        stage.model.dtype,
        stage.device,
    )
    stage.sampler = TokenSampler(limits, keeps_tokens=True)
    recorder = FakeRecorder()
    if graphs:
        stage.use_graphs(limits, recorder)
    engine.config = replace(engine.config, runs_ahead=ahead)
    engine._scheduler = Scheduler(engine.config, limits)
    if ahead:  # tokens are never there yet when a GPU is asked without waiting
        result = engine.pipeline.result
        engine.pipeline.result = lambda wait: result(wait) if wait else None
    return recorder


@pytest.fixture(scope="module")
def plain(tiny_llama):
    with dist_int8.load(tiny_llama, **OPTIONS, prefill_chunk=16) as model:
        yield model


@pytest.fixture
def ready(tiny_llama):
    with dist_int8.load(tiny_llama, **OPTIONS, prefill_chunk=16) as model:
        yield model


def test_buckets():
    assert list_buckets(1) == [1]
    assert list_buckets(6) == [1, 2, 4, 6]
    assert list_buckets(32) == [1, 2, 4, 8, 16, 24, 32]
    assert list_buckets(20) == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("graphs", "ahead"), [(True, False), (False, True), (True, True)])
def test_tokens_are_those_without(plain, ready, settings, graphs, ahead):
    expected = answers(plain, prompts(), **settings)
    recorder = make_ready(ready, graphs, ahead)
    assert answers(ready, prompts(), **settings) == expected
    if graphs:
        assert recorder.num_recorded <= 5 < recorder.num_replayed
    again = recorder.num_recorded
    assert answers(ready, prompts()[::-1], **settings) != expected
    assert recorder.num_recorded <= max(again, 5)


@pytest.mark.parametrize("ahead", [False, True])
def test_answers_that_end_early_leave_their_slots_clean(plain, ready, ahead):
    """Ends that only the host sees: one token too many is computed, in a slot that is given on."""
    ends = {"stop_token_ids": list(range(0, 288, 9)), "temperature": 3.0}
    expected = answers(plain, prompts() * 2, **ends)
    assert {reason for _, reason in expected} >= {"stop", "length"}
    make_ready(ready, ahead=ahead)
    assert answers(ready, prompts() * 2, **ends) == expected


def test_an_answer_that_fills_its_slot_is_not_run_past_it(plain, ready):
    asked = prompts((90, 95, 80))
    expected = answers(plain, asked, max_new_tokens=50)
    make_ready(ready)
    assert answers(ready, asked, max_new_tokens=50) == expected
    assert [len(tokens) for tokens, _ in expected] == [6, 1, 16]


def test_rarer_rules_run_beside_graphs(plain, ready):
    rules = {"no_repeat_ngram_size": 2, "min_new_tokens": 5, "suppress_tokens": [3, 4]}
    expected = answers(plain, prompts(), **rules)
    recorder = make_ready(ready)
    assert answers(ready, prompts(), **rules) == expected and recorder.num_replayed == 0
    assert answers(ready, prompts()) == answers(plain, prompts()) and recorder.num_replayed > 0


def test_two_steps_are_in_flight(ready):
    make_ready(ready)
    engine = ready._engine
    seen = []
    submit = engine.pipeline.submit

    def watched(micro_batch):
        seen.append((micro_batch.token_ids.tolist(), len(engine._in_flight)))
        submit(micro_batch)

    engine.pipeline.submit = watched
    answers(ready, prompts((3,)), max_new_tokens=6)
    ids, in_flight = zip(*seen, strict=True)
    assert len(ids[0]) == 3 and set(map(tuple, ids[1:])) == {(-1,)}  # read on the device
    assert in_flight == (0, 1, 1, 1, 1, 1)


def test_cancelling_with_two_steps_in_flight(plain, ready):
    make_ready(ready)
    engine = ready._engine
    chosen = ready._encoder.choose(None, {"max_new_tokens": 20})
    requests = ready._encoder.make_requests(prompts((5, 7)), chosen)
    engine.add(requests)
    while not requests[0].token_ids:
        engine.step()
    engine.cancel(requests[0])
    while not all(request.ended for request in requests):
        engine.step()
    assert requests[0].finish_reason == "cancelled"
    (expected,) = answers(plain, prompts((5, 7))[1:])
    assert requests[1].token_ids == expected[0]
    assert len(engine._scheduler.free_slots) == OPTIONS["max_sequences"]
    assert answers(ready, prompts()) == answers(plain, prompts())


def test_hidden_states_of_a_middle_stage_go_through_a_graph():
    def compute(batch, hidden_states):
        return hidden_states * batch.lengths[:, None] + batch.token_ids[:, None]

    recorder, cpu = FakeRecorder(), torch.device("cpu")
    graphs = DecodeGraphs(recorder, cpu, max_rows=12, hidden=(3, torch.float32))
    for num_rows in (5, 7, 2, 12, 6):
        slots = torch.randperm(12)[:num_rows]
        positions = torch.randint(0, 50, (num_rows,))
        segments = torch.stack([slots, positions, torch.ones(num_rows).long()], 1).int()
        token_ids = torch.randint(0, 99, (num_rows,))
        micro_batch = MicroBatch(
            Kind.STEP,
            token_ids=token_ids,
            segments=segments,
            emits=torch.ones(num_rows, dtype=torch.int64),
        )
        assert graphs.take(micro_batch, compute)
        hidden_states = torch.randn(num_rows, 3)
        got = graphs.run(micro_batch, hidden_states)
        expected = hidden_states * (positions + 1)[:, None] + token_ids[:, None]
        assert torch.equal(got, expected) and got.is_contiguous()
    assert (recorder.num_recorded, recorder.num_replayed) == (3, 5)


def test_only_decode_steps_are_taken():
    graphs = DecodeGraphs(FakeRecorder(), torch.device("cpu"), 4, None)

    def takes(rows, kind):
        micro_batch = MicroBatch(Kind.STEP, segments=rows, **kind)
        return graphs.take(micro_batch, lambda *_: torch.zeros(1))

    kind = {"token_ids": torch.zeros(3).long(), "emits": torch.ones(2).long()}
    rows = torch.tensor([[0, 5, 1], [1, 0, 2]], dtype=torch.int32)
    assert not takes(rows, kind)
    rows[1, 2], kind["token_ids"] = 1, torch.zeros(2).long()
    assert takes(rows, kind)
    kind["emits"][0] = 0  # a chunk of one token that does not end its prompt
    assert not takes(rows, kind)


def test_steps_that_cannot_be_recorded_run_as_before(plain, ready, caplog):
    make_ready(ready)
    tried = []

    def fail(work):
        tried.append(work)
        raise RuntimeError("operation not permitted when stream is capturing")

    ready._engine.pipeline.stage.use_graphs(ready._engine.limits, fail)
    assert answers(ready, prompts()) == answers(plain, prompts())
    assert len(tried) == 1 and caplog.text.count("cannot be recorded") == 1


def test_a_stage_with_graphs_is_freed_without_a_garbage_collection(ready):
    make_ready(ready)
    answers(ready, prompts((3,)))
    stage = weakref.ref(ready._engine.pipeline.stage)
    gc.disable()
    try:
        ready.shutdown()
        assert stage() is None
    finally:
        gc.enable()
