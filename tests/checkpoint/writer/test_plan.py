"""The plan of a rewriting: what each tensor is made from, known before anything is written."""

import pytest
import torch

from dist_int8.checkpoint.writer import dequantize, quantize


def list_recipes(job):
    return {recipe.outputs[0].name: recipe for shard in job.plan.shards for recipe in shard}


def list_names(recipe):
    return [output.name.rpartition(".")[2] for output in recipe.outputs]


def test_every_tensor_is_made_from_one_stored_tensor_in_its_form(originals, tmp_path):
    hot = {"blocks.0.qkv": [3, 17]}
    job = quantize(originals["llama"], tmp_path / "out", hot_columns=hot)
    recipes = list_recipes(job)
    norm = recipes["model.norm.weight"]
    assert (norm.form, list_names(norm)) == ("floating", ["weight"])
    down = recipes["model.layers.0.mlp.down_proj.weight"]
    assert (down.form, list_names(down)) == ("dist_int8", ["weight", "col_scale"])
    assert down.piece.name == "model.layers.0.mlp.down_proj.weight"
    for kind in "qkv":  # they make one linear of ours, with the same hot columns
        recipe = recipes[f"model.layers.0.self_attn.{kind}_proj.weight"]
        assert list_names(recipe) == ["weight", "col_scale", "hot_weight", "hot_columns"]
        assert torch.equal(recipe.hot_columns, torch.tensor([3, 17], dtype=torch.int32))
        assert recipe.outputs[2].shape == (recipe.piece.shape[0], 2)
    assert not list(tmp_path.iterdir())


def test_columns_that_calibration_finds_are_planned_by_their_number(originals, tmp_path):
    job = quantize(originals["llama"], tmp_path / "out", calibrate="random", skip=["down"])
    recipes = list_recipes(job)
    up = recipes["model.layers.1.mlp.up_proj.weight"]
    assert (up.calibrated, up.hot_columns) == ("blocks.1.gate_up", None)
    assert up.outputs[3].shape == (16,)
    assert recipes["model.layers.1.mlp.down_proj.weight"].calibrated is None
    assert job.plan.calibrates_head and job.plan.num_bytes_read > 0
    skipping = quantize(originals["llama"], tmp_path / "out", calibrate="random")
    assert not skipping.plan.calibrates_head


@pytest.mark.parametrize("skip", [(), ("lm_head",)])
def test_a_tied_head_is_written_only_where_it_is_not_the_embedding(originals, tmp_path, skip):
    recipes = list_recipes(quantize(originals["llama_tied"], tmp_path / "out", skip=skip))
    assert ("lm_head.weight" in recipes) == (not skip)


def test_dequantize_plans_one_dtype_for_all(originals, tmp_path):
    quantize(originals["bloom"], tmp_path / "int8").run()
    job = dequantize(tmp_path / "int8", tmp_path / "out", dtype="bfloat16")
    outputs = [output for recipe in list_recipes(job).values() for output in recipe.outputs]
    assert {output.dtype for output in outputs} == {"BF16"}
    assert job.plan.config["dtype"] == "bfloat16" and job.plan.calibration is None
