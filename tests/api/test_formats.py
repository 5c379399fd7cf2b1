"""load() with hot columns, head and embedding in int8: same for any stages, bytes as planned."""

import json

import pytest
import torch
from tiny_models import tensors_of
from transformers import LlamaForCausalLM

import dist_int8
from dist_int8.checkpoint.writer import quantize
from dist_int8.cli import app
from dist_int8.evaluation.outlier_features import inject_outlier_features

OPTIONS = {"progress": False, "threads_per_stage": 1, "max_tokens": 96}
INT8 = {"head": "int8", "embedding": "int8", "calibrate": "random"}
IDS = torch.arange(40).view(2, 20)


def held_bytes(model):
    """Bytes that the stage in this process holds, each storage counted once."""
    tensors = tensors_of(model._engine.pipeline.stage.model)
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@pytest.fixture(scope="module")
def hard_llama(tiny_llama, tmp_path_factory):
    """The tiny model with outlier features, in bf16."""
    folder = tmp_path_factory.mktemp("hard")
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    inject_outlier_features(model, seed=0)
    model.save_pretrained(folder)
    return folder


def logits(folder, num_stages=1, **options):
    options = OPTIONS | options
    with dist_int8.load(folder, devices=["cpu"] * num_stages, **options) as model:
        return model.logits(IDS)


def test_two_stages_are_one_stage_bit_for_bit(hard_llama):
    assert torch.equal(logits(hard_llama, **INT8), logits(hard_llama, 2, **INT8))


def test_hot_columns_bring_the_logits_closer(hard_llama):
    exact = logits(hard_llama, int8=False)

    def error(**options):
        return float((logits(hard_llama, **options) - exact).norm() / exact.norm())

    assert error(calibrate="random") < error() / 1.5
    head = {"head": "int8", "skip_modules": ["blocks"], "outlier_rule": "none"}
    assert error(calibrate="random", **head) < error(**head) / 1.2
    assert error(calibrate="random", num_hot_columns=0) == error()


@pytest.mark.parametrize(
    ("num_stages", "formats"),
    [
        (1, INT8),
        (1, INT8 | {"head": "16bit"}),
        (1, INT8 | {"embedding": "16bit", "num_hot_columns": 32}),
        (1, INT8 | {"num_hot_columns": 0}),
        (2, INT8),
    ],
)
@pytest.mark.parametrize("random_weights", [False, True])
def test_bytes_are_those_of_the_plan(hard_llama, formats, num_stages, random_weights):
    options = OPTIONS | formats | {"random_weights": random_weights}
    with dist_int8.load(hard_llama, devices=["cpu"] * num_stages, **options) as model:
        assert model.plan.stages[0].bytes == held_bytes(model)
        assert model.generate([1, 2, 3], max_new_tokens=2)[0].token_ids


def test_an_int8_kv_cache(hard_llama):
    rounded = logits(hard_llama, kv="int8")
    assert torch.equal(logits(hard_llama, 2, kv="int8", prefill_chunk=7), rounded)
    # random weights amplify small changes, so this compares without int8 linears
    exact = logits(hard_llama, int8=False)
    rounded = logits(hard_llama, int8=False, kv="int8")
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
    with dist_int8.load(hard_llama, devices=["cpu"], kv="int8", **OPTIONS) as model:
        held = model._engine.pipeline.stage.kv_cache.num_bytes()
        assert model.plan.kv_bytes_per_token * 8 * 96 == held
        assert model.plan.kv_bytes_per_token == 4 * 2 * 2 * (16 + 4)
        ids = [[1, 2, 3], [9] * 20, [5] * 3]
        together = [answer.token_ids for answer in model.generate(ids, max_new_tokens=8)]
        alone = [model.generate([row], max_new_tokens=8)[0].token_ids for row in ids]
        assert together == alone


def test_an_int8_checkpoint_decides_its_formats(hard_llama, tmp_path, capsys):
    options = {"skip": (), "embedding_int8": True, "calibrate": "random", "rotation": 64}
    options["down_hot_columns"] = 64
    job = quantize(hard_llama, tmp_path / "int8", **options)
    assert job.run()
    expected = logits(hard_llama, **INT8)
    assert torch.equal(logits(tmp_path / "int8"), expected)
    assert torch.equal(logits(tmp_path / "int8", 2, calibrate="random", head="16bit"), expected)
    with dist_int8.load(tmp_path / "int8", devices=["cpu"], **OPTIONS) as model:
        assert model.plan.stages[0].bytes == held_bytes(model)
        weights = held_bytes(model)
    flags = ["--devices", "cpu", "--context", "96", "--json"]
    assert app.run(["plan", "-m", str(tmp_path / "int8"), *flags]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"][0]["bytes"]["weights"]
    assert planned == weights
    flags += ["--head", "int8", "--embedding", "int8", "--hot-columns", "16"]
    assert app.run(["plan", "-m", str(hard_llama), *flags]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"][0]["bytes"]["weights"]
    assert planned == weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibrate": "/no/such.txt"}, "calibrate must be random, off or a text file, got"),
        ({"num_hot_columns": 8}, "num_hot_columns must be a multiple of 16, got 8"),
        ({"head": "int4"}, "head must be 'int8' or '16bit', got 'int4'"),
        ({"int8": False, "embedding": "int8"}, "embedding must be 16bit where int8 is false"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tiny_llama, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        logits(tiny_llama, **settings)
    assert "\n" not in str(error.value)
