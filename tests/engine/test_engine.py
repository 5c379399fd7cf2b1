"""Requests join and leave a real pipeline while others run."""

import itertools
import threading

import pytest
import torch

import dist_int8
from dist_int8.errors import QueueFullError, RankError

PROMPTS = [list(range(3 + i, 3 + i + length)) for i, length in enumerate((5, 40, 1, 17, 8, 29))]
OPTIONS = {
    "max_sequences": 4,
    "max_tokens": 96,
    "threads_per_stage": 1,
    "progress": False,
    "max_queue": 8,
    "prefill_chunk": 16,
}


@pytest.fixture(scope="module")
def model(tiny_llama):
    with dist_int8.load(tiny_llama, devices=["cpu"] * 2, micro_batches=3, **OPTIONS) as model:
        yield model


@pytest.fixture(scope="module")
def alone(model):
    """The answer to each prompt, run alone."""
    return [model.generate(prompt, max_new_tokens=16)[0].token_ids for prompt in PROMPTS]


def make_requests(model, **settings):
    from dist_int8.config import GenerationSettings

    settings = GenerationSettings.from_generation_config(None, {"max_new_tokens": 16} | settings)
    return model._encoder.make_requests(PROMPTS, settings)


def test_requests_that_join_late_get_the_same_tokens(model, alone):
    engine = model._engine
    requests = make_requests(model)
    engine.add(requests[:2])
    for request in requests[2:]:
        for _ in range(3):
            engine.step()
        engine.add([request])
    while not all(request.ended for request in requests):
        assert engine.step()
    assert [request.token_ids for request in requests] == alone
    assert engine.num_running == engine.num_waiting == 0 and not engine.step()


def test_callers_that_had_not_begun_when_a_rank_was_lost_hear_of_the_loss(tiny_llama):
    """Not that the model was shut down: that is only what the loss led to."""
    with dist_int8.load(tiny_llama, devices=["cpu"], **OPTIONS) as model:
        engine = model._engine
        lost = RankError("rank 1 ended by SIGKILL", 1)
        engine._driver.call(lambda: engine._fail(lost))
        for call in (engine.run(make_requests(model)), engine.logits(PROMPTS)):
            with pytest.raises(RankError, match="rank 1 ended by SIGKILL"):
                list(call)


def test_a_long_prompt_does_not_hold_up_a_running_answer(model):
    engine = model._engine
    short, long = make_requests(model, max_new_tokens=40)[:2]
    long.prompt_ids = long.prompt_ids + long.prompt_ids[:40]
    engine.add([short])
    while len(short.token_ids) < 2:
        engine.step()
    engine.add([long])
    before = engine.num_steps
    while not long.token_ids:
        engine.step()
    kinds = [record.kind for record in engine.pipeline.trace.since(before)]
    assert kinds.count("P") >= 5 and "D" in kinds[: kinds.index("P", 2) + 1]
    while not (short.ended and long.ended):
        engine.step()


def test_lanes_stay_level_when_requests_end(model):
    engine = model._engine
    requests = make_requests(model)[:4]  # lanes of 2, 1 and 1
    for request in requests[1:3]:
        request.settings = request.settings.model_copy(update={"max_new_tokens": 3})
    engine.add(requests)
    while not all(request.ended for request in requests[1:3]):
        engine.step()
    before = engine.num_steps
    while not all(request.ended for request in requests):
        engine.step()
    rows = [record.num_tokens for record in engine.pipeline.trace.since(before + 2)]
    assert rows and max(rows) == 1  # the two that are left decode in lanes of their own


def test_a_cancelled_request_frees_its_slot_and_leaves_the_others_alone(model, alone):
    engine = model._engine
    requests = make_requests(model)
    engine.add(requests)
    waiting, running = requests[5], requests[1]
    engine.cancel(waiting)
    while not running.token_ids:
        engine.step()
    engine.cancel(running)
    for _ in range(2 * engine.config.num_stages + 1):
        engine.step()
    assert all(running is not request for request in engine._scheduler.running)
    while not all(request.ended for request in requests):
        engine.step()
    assert (waiting.finish_reason, running.finish_reason) == ("cancelled", "cancelled")
    for index in (0, 2, 3, 4):
        assert requests[index].token_ids == alone[index]
    assert waiting.token_ids == [] and len(engine._scheduler.free_slots) == 4


def test_a_full_queue_refuses_new_requests_and_answers_the_others(model, alone):
    engine = model._engine
    first, second = make_requests(model), make_requests(model)
    engine.add(first)  # 4 run, 2 wait
    engine.add(second)  # 8 wait
    with pytest.raises(QueueFullError, match="at most 8 requests may wait for a slot, got 9"):
        engine.add(make_requests(model)[:1])
    while not all(request.ended for request in first + second):
        engine.step()
    assert [request.token_ids for request in first + second] == alone * 2


def test_a_list_longer_than_the_queue_runs_to_its_end(model, alone):
    answers = model.generate(PROMPTS * 5, max_new_tokens=16)
    assert [answer.token_ids for answer in answers] == alone * 5


def test_threads_share_the_pipeline(model, alone):
    answers: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        answers[index] = model.generate(PROMPTS[index], max_new_tokens=16)[0].token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answers[index] for index in range(len(PROMPTS))] == alone


def test_two_streams_interleave(model, alone):
    streams = [model.generate(PROMPTS[i], max_new_tokens=16, stream=True) for i in (0, 1)]
    pairs = list(zip(*streams, strict=True))
    for i in (0, 1):
        assert [pair[i].token_id for pair in pairs] == alone[i]


def test_logits_between_running_requests(model, alone):
    engine = model._engine
    expected = model.logits([PROMPTS[0]])
    requests = make_requests(model)
    engine.add(requests)  # more than there are slots: logits waits for one
    engine.step()
    assert (model.logits([PROMPTS[0]]) == expected).all()
    while not all(request.ended for request in requests):
        engine.step()
    assert [request.token_ids for request in requests] == alone


def test_the_trace_gives_the_utilisation_of_every_stage(model):
    from dist_int8.pipeline import trace

    before = model._engine.num_steps
    model.generate(PROMPTS, max_new_tokens=16)
    shares = trace.utilisation(model._engine.pipeline.trace.since(before))
    assert len(shares) == 2 and all(0.0 < share <= 1.0 for share in shares)


@pytest.mark.parametrize("pieces_taken", [0, 1, 3])
def test_iter_logits_of_sequences_of_different_lengths(model, pieces_taken):
    expected = [model.logits([prompt])[0] for prompt in PROMPTS]
    seen = []
    for index, start, values in model.iter_logits(PROMPTS):
        seen.append((index, start, len(values)))
        assert (values == expected[index][start : start + len(values)]).all()
    # at most prefill_chunk tokens per micro-batch, of any sequences
    assert seen[:3] == [(0, 0, 5), (1, 0, 11), (1, 11, 16)]
    assert sum(count for _, _, count in seen) == sum(map(len, PROMPTS))
    pieces = model.iter_logits(PROMPTS)
    for _ in range(pieces_taken):
        next(pieces)
    pieces.close()  # takes the results under way, so that the next call gets its own
    assert (model.logits([PROMPTS[3]])[0] == expected[3]).all()


def test_more_sequences_than_slots_share_a_micro_batch(model):
    prompts = [[token] for token in range(3, 14)]
    expected = [model.logits([prompt])[0] for prompt in prompts]
    seen = {index: values for index, _, values in model.iter_logits(prompts)}
    assert sorted(seen) == list(range(len(prompts)))
    assert all((seen[index] == expected[index]).all() for index in seen)


@pytest.fixture
def make_engine(model):
    """Engines of other settings over the same pipeline."""
    from dist_int8.engine import Engine, EngineConfig

    def make(**settings):
        before = model._engine
        before.drain()
        defaults = {"num_micro_batches": 2, "prefill_chunk": 16, "smallest_chunk": 4}
        config = EngineConfig(num_stages=2, max_queue=64, **defaults | settings)
        return Engine(before.pipeline, before.limits, config)

    return make


def test_prompt_micro_batches_are_short_while_an_answer_runs(model, alone, make_engine):
    engine = make_engine()
    engine.num_steps = model.trace.last_step
    requests = sorted(make_requests(model), key=lambda request: -len(request.prompt_ids))
    more = make_requests(model)
    engine.add(requests + more)
    sizes = {False: [0], True: [0]}
    while not all(request.ended for request in requests + more):
        answering, before = engine._scheduler.answering, engine.num_steps
        engine.step()
        if engine.num_steps > before and engine._in_flight:
            sizes[answering].append(engine._in_flight[-1].micro_batch.num_tokens)
    assert max(sizes[False]) == 16 and 4 < max(sizes[True]) <= 4 + 3
    assert {request.index: request.token_ids for request in requests} == dict(enumerate(alone))
    assert [request.token_ids for request in more] == alone


def test_a_lane_with_prompts_does_not_hold_up_answers_in_another(model, make_engine):
    """Both lanes have a prompt to prefill and an answer to decode: neither prefills whole while
    the other's answer waits longer than for what is in flight."""
    engine = make_engine(smallest_chunk=2, prefill_chunk=2)
    engine.num_steps = model.trace.last_step
    short, other, long, longer = (make_requests(model, max_new_tokens=50)[i] for i in (0, 2, 1, 5))
    engine.add([short, other])
    while not (short.token_ids and other.token_ids):
        engine.step()
    engine.add([long, longer])
    before = engine.num_steps
    while long.num_prompt_left and longer.num_prompt_left:
        engine.step()
    lanes = [record.lane for record in model.trace.since(before)]
    longest = max(len(list(group)) for _, group in itertools.groupby(lanes))
    assert len(lanes) > 12 and longest <= engine._scheduler.in_flight_limit + 1
    for request in (short, other, long, longer):
        engine.cancel(request)
    engine.drain()


def test_one_micro_batch_keeps_one_in_flight(model, alone, make_engine):
    engine = make_engine(num_micro_batches=1)
    engine.num_steps = model.trace.last_step
    requests = make_requests(model)
    engine.add(requests)
    while engine.step():
        assert len(engine._in_flight) <= 1
    assert [request.token_ids for request in requests] == alone


def test_a_stream_that_pauses_loses_no_token(model, alone, make_engine):
    """Another call ends its requests while some of their tokens are not handed out yet."""
    engine = make_engine(num_micro_batches=1)
    engine.num_steps = model.trace.last_step
    paused, other = (engine.run(make_requests(model)[:2]) for _ in range(2))
    tokens = [next(paused)]
    while tokens[-1].index == 0:
        tokens.append(next(paused))
    assert len(list(other)) == 32
    tokens += paused
    for index in (0, 1):
        assert [token.token_id for token in tokens if token.index == index] == alone[index]


def test_sampling_is_batch_invariant(model):
    settings = {"temperature": 0.9, "top_k": 40, "seed": 11, "max_new_tokens": 16}
    crowd = model.generate(PROMPTS, **settings)
    for index in (1, 4):
        settings["seed"] = 11 + index
        assert model.generate(PROMPTS[index], **settings)[0].token_ids == crowd[index].token_ids
    assert len({tuple(answer.token_ids) for answer in crowd}) == len(PROMPTS)


def test_a_request_that_fails_by_itself_leaves_the_others_alone(model, alone):
    requests = make_requests(model)
    embedding = model._engine.pipeline.stage.model.embedding.weight
    unused = next(i for i in range(200, 287) if all(i not in tokens for tokens in alone))
    kept = embedding[unused].clone()
    requests[1].prompt_ids[7] = unused
    with torch.no_grad():
        embedding[unused] = float("nan")
        tokens = list(model.run(iter(requests), keep_going=True))
        embedding[unused] = kept
    assert "logits of prompt 1" in str(requests[1].error) and not requests[1].token_ids
    assert {token.index for token in tokens} == {0, 2, 3, 4, 5}
    for index in (0, 2, 3, 4, 5):
        assert requests[index].token_ids == alone[index]
    assert len(model._engine._scheduler.free_slots) == 4


def test_requests_are_taken_as_there_is_room(model, alone):
    made = []

    def endless():
        for round_ in itertools.count():
            for request in make_requests(model):
                request.index += len(PROMPTS) * round_
                made.append(request)
                yield request

    stream = model.run(endless())
    ended = 0
    while ended < 20:
        ended += next(stream).finish_reason is not None
    assert len(made) <= ended + 2 * OPTIONS["max_sequences"]
    stream.close()
    assert model._engine.num_running == model._engine.num_waiting == 0 or model._engine.step()
    for request in made:
        assert request.token_ids == alone[request.index % len(PROMPTS)][: len(request.token_ids)]
