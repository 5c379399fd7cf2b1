"""The recipe of the witness: it learns, can be repeated, and runs in the pipeline as trained."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import dist_int8

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ARGUMENTS = argparse.Namespace(
    hidden=64, layers=2, llama_mlp=0, seed=0, steps=40, window=32, tokens_per_step=256, lr=4e-3
)


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(BENCHMARKS))
    import train_witness

    yield train_witness
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def text():
    lines = (BENCHMARKS / "tasks" / "cloze.jsonl").read_text().splitlines()
    return "\n\n".join(json.loads(line)["context"] for line in lines)


@pytest.fixture(scope="module")
def trained(recipe, text):
    tokenizer = recipe.train_tokenizer(text, 384)
    ids = torch.tensor(tokenizer(text).input_ids)
    model = recipe.new_model(ARGUMENTS, tokenizer)
    before = recipe.perplexity(model, ids[:2000], 32)
    recipe.train(model, ids, ARGUMENTS)
    return model, tokenizer, ids, before


def test_witness_learns(recipe, trained):
    model, tokenizer, ids, before = trained
    assert before == pytest.approx(len(tokenizer), rel=0.2)  # it knew nothing
    unigram, _ = recipe.counted_perplexities(ids.tolist(), ids[:2000].tolist(), len(tokenizer))
    assert recipe.perplexity(model, ids[:2000], 32) < unigram


def test_the_same_seed_gives_the_same_weights(recipe, trained):
    model, tokenizer, ids, _ = trained
    again = recipe.new_model(ARGUMENTS, tokenizer)
    recipe.train(again, ids, ARGUMENTS)
    for mine, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_pipeline_runs_the_witness(trained, tmp_path):
    model, tokenizer, ids, _ = trained
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = model(ids[None, :64]).logits
    options = {"devices": ["cpu"], "threads_per_stage": 1, "progress": False, "int8": False}
    with dist_int8.load(tmp_path, dtype="float32", max_tokens=64, **options) as loaded:
        torch.testing.assert_close(loaded.logits(ids[None, :64]), expected, rtol=0, atol=1e-4)
        assert loaded.tokenizer("Enter Ariel").input_ids == tokenizer("Enter Ariel").input_ids


def test_counted_perplexities(recipe):
    # tokens 0 1 0 1 0: 0 comes three times and 1 twice, and after each comes the other
    unigram, bigram = recipe.counted_perplexities([0, 1, 0, 1, 0], [0, 1, 0], num=2)
    p0, p1 = 4 / 7, 3 / 7
    assert unigram == pytest.approx(math.exp(-(math.log(p1) + math.log(p0)) / 2))
    # Witten-Bell: (count + kinds * unigram) / (times seen + kinds), one kind of follower each
    after = math.log((2 + p1) / 3) + math.log((2 + p0) / 3)
    assert bigram == pytest.approx(math.exp(-after / 2))
