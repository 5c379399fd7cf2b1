"""Stages as threads of one process give what ranks give, and fail and end as cleanly."""

import threading

import psutil
import pytest
import torch

import dist_int8
from dist_int8 import RankError

PROMPTS = [[5, 9, 2, 7], [11, 3], list(range(40, 75))]


def load(folder, **settings):
    return dist_int8.load(
        folder, threads_per_stage=1, max_tokens=64, max_sequences=4, progress=False, **settings
    )


def stage_threads():
    return [t for t in threading.enumerate() if t.name.startswith("stage ")]


@pytest.fixture
def ids_of_one_stage(tiny_llama):
    with load(tiny_llama, devices=["cpu"]) as model:
        answers = model.generate(PROMPTS, max_new_tokens=12)
        return [answer.token_ids for answer in answers], model.logits([PROMPTS[2]])[0]


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_same_tokens_and_logits_without_another_process(
    tiny_llama, ids_of_one_stage, micro_batches
):
    children = psutil.Process().children()
    with load(
        tiny_llama, devices=["cpu", "cpu"], in_process=True, micro_batches=micro_batches
    ) as model:
        assert psutil.Process().children() == children and len(stage_threads()) == 1
        answers = model.generate(PROMPTS, max_new_tokens=12)
        assert [answer.token_ids for answer in answers] == ids_of_one_stage[0]
        assert torch.equal(model.logits([PROMPTS[2]])[0], ids_of_one_stage[1])
        assert [stage["rank"] for stage in model.stages] == [0, 1]
    assert not stage_threads()


def test_a_stage_that_fails_is_named_and_ends_the_model(tiny_llama, monkeypatch):
    model = load(tiny_llama, devices=["cpu", "cpu"], in_process=True)

    def fail(self, *_):
        raise MemoryError("no room for the logits")

    monkeypatch.setattr("dist_int8.engine.sampling.TokenSampler.sample", fail)
    with pytest.raises(RankError, match="rank 1 failed: MemoryError: no room"):
        model.generate(PROMPTS, max_new_tokens=4)
    with pytest.raises(RankError, match="load the model again"):
        model.generate(PROMPTS, max_new_tokens=4)
    assert not stage_threads()
