"""An int8 token embedding and an int8 head: loaded, stored, copied, and back in floating point."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    assert_same_stage,
    compute_logits,
    find_tiny_columns,
    load_tiny_stage,
    read_spec,
)

from dist_int8.checkpoint import StageFormat, make_random_stage, read_stored_format
from dist_int8.checkpoint.writer import dequantize, quantize
from dist_int8.int8 import reference
from dist_int8.int8.embedding import Int8Embedding
from dist_int8.models import StageSlice


def remove_tensors(folder, *names):
    """Take tensors out of an int8 checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in names:
        path = folder / index["weight_map"].pop(name)
        save_file({n: t for n, t in load_file(path).items() if n != name}, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt"])
@pytest.mark.parametrize("embedding_int8", [False, True])
def test_an_int8_head_has_hot_columns_of_its_own(originals, tmp_path, name, embedding_int8):
    """In the checkpoint, a copy and back in floating point; a tied embedding stays whole."""
    original = originals[name]
    spec = read_spec(original)
    options = {"skip": (), "embedding_int8": embedding_int8, "shard_bytes": 30_000}
    quantize(original, tmp_path / "int8", calibrate="random", **options).run()
    found = find_tiny_columns(original, stage_slice=StageSlice.whole(spec))
    floating = load_tiny_stage(original, int8=False)
    direct = load_tiny_stage(original, skip=(), embedding_int8=embedding_int8, hot_columns=found)
    stored = load_tiny_stage(tmp_path / "int8")
    assert_same_stage(direct, stored)
    columns = found["lm_head"]
    assert stored.lm_head.hot_columns.tolist() == columns
    assert torch.equal(stored.lm_head.hot_weight, floating.lm_head.weight[:, columns])
    assert read_stored_format(tmp_path / "int8", spec).head_hot_columns == 16
    if embedding_int8:
        table = reference.dequantize_weight(*reference.quantize_weight(floating.embedding.weight))
        assert torch.equal(stored.embedding(torch.arange(30), torch.float32), table[:30])
    else:
        assert torch.equal(stored.embedding.weight, floating.embedding.weight)
    quantize(tmp_path / "int8", tmp_path / "copy", shard_bytes=30_000).run()
    copied = load_tiny_stage(tmp_path / "copy")
    assert_same_stage(copied, stored)
    remove_tensors(tmp_path / "copy", "lm_head.hot_columns", "lm_head.hot_weight")
    with pytest.raises(ValueError, match=r"hot_weight must have 16 columns, as config\.json"):
        load_tiny_stage(tmp_path / "copy")
    dequantize(tmp_path / "int8", tmp_path / "floating", dtype="float32").run()
    restored = load_tiny_stage(tmp_path / "floating", int8=False)
    assert torch.equal(restored.lm_head.weight, stored.lm_head.dequantize())


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt"])
@pytest.mark.parametrize("skip", [(), ("lm_head",)])
def test_an_int8_embedding_shares_its_table_with_a_tied_int8_head(originals, tmp_path, name, skip):
    original = originals[name]
    spec = read_spec(original)
    floating = load_tiny_stage(original, int8=False)
    stage = load_tiny_stage(original, skip=skip, embedding_int8=True)
    table = floating.embedding.weight
    weight_int8, col_scale = reference.quantize_weight(table)
    assert isinstance(stage.embedding, Int8Embedding)
    assert torch.equal(stage.embedding.weight_int8, weight_int8)
    ids = torch.arange(30)
    rows = stage.embedding(ids, torch.float32)
    assert torch.equal(rows, reference.dequantize_weight(weight_int8, col_scale)[:30])
    shared = getattr(stage.lm_head, "weight_int8", None) is stage.embedding.weight_int8
    assert shared == (spec.tied_head and not skip)
    stage.to(torch.bfloat16)
    assert stage.embedding.col_scale.dtype == torch.float32
    options = {"skip": skip, "embedding_int8": True, "shard_bytes": 30_000}
    quantize(original, tmp_path / "int8", **options).run()
    stage = load_tiny_stage(original, skip=skip, embedding_int8=True)
    stored = load_tiny_stage(tmp_path / "int8")
    assert_same_stage(stored, stage)
    assert torch.equal(compute_logits(stored, ids), compute_logits(stage, ids))
    assert read_stored_format(tmp_path / "int8", spec).embedding_int8
    stage_format = StageFormat(skip=skip, embedding_int8=True)
    made = make_random_stage(spec, StageSlice.whole(spec), stage_format, num_hot_columns=16)
    assert made.blocks["0"].qkv.hot_columns.tolist() == list(range(16))
    assert compute_logits(made, ids).isfinite().all()
    hot = set() if skip else {"hot_columns", "hot_weight"}
    assert set(made.lm_head.state_dict()) == set(stage.lm_head.state_dict()) | hot
    dequantize(tmp_path / "int8", tmp_path / "floating", dtype="float32").run()
    restored = load_tiny_stage(tmp_path / "floating", int8=False)
    expected = reference.dequantize_weight(weight_int8, col_scale)
    assert torch.equal(restored.embedding.weight, expected)
    head = floating.lm_head.weight if skip else stage.lm_head.dequantize()
    assert torch.equal(restored.lm_head.weight, head)
    if not (spec.tied_head and not skip):
        quantize(tmp_path / "int8", tmp_path / "bnb", target="bitsandbytes").run()
        theirs = load_tiny_stage(tmp_path / "bnb")
        assert torch.equal(theirs.embedding.weight, expected)
