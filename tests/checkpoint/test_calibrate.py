"""Hot columns found by calibration: the right ones, in bounded memory, the same after a kill."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from dist_int8.checkpoint import find_hot_columns, load_stage, make_calibration, stored_format
from dist_int8.checkpoint.load import random_stage
from dist_int8.checkpoint.writer import dequantize, quantize
from dist_int8.evaluation.outlier_features import inject_outlier_features
from dist_int8.int8 import reference
from dist_int8.int8.embedding import Int8Embedding
from dist_int8.models import TokenBatch, describe, load_config, tensor_sources

MODELS = ["llama", "llama_tied", "bloom", "opt", "gpt_neox"]
EDGES = {"first": True, "last": True}


def spec_of(folder):
    return describe(load_config(folder))


def columns_of(folder, num_hot_columns=16, **options):
    spec = spec_of(folder)
    calibration = make_calibration(folder, spec, "random", num_hot_columns)
    return find_hot_columns(folder, spec, calibration, **options)


def lose(folder, *names):
    """Takes tensors out of an int8 checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in names:
        path = folder / index["weight_map"].pop(name)
        save_file({n: t for n, t in load_file(path).items() if n != name}, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same(one, two):
    assert list(one) == list(two)
    return all(torch.equal(one[key], two[key]) for key in one)


class Caches:
    """KV cache of one sequence."""

    def __init__(self, spec, num_tokens=64):
        block = spec.blocks[0]
        shape = (1, block.num_kv_heads, block.head_dim, num_tokens)
        self.layers = [
            (torch.zeros(shape), torch.zeros(shape).transpose(2, 3).contiguous())
            for _ in spec.blocks
        ]

    def layer(self, index):
        return self.layers[index]


@torch.inference_mode()
def logits(stage, ids):
    batch = TokenBatch.from_segments(ids, [(0, 0, len(ids))])
    return stage(batch, None, Caches(stage.spec))


def features(folder, out):
    """The model with outlier features in its norms' outputs, and transformers' names of them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = inject_outlier_features(model, seed=3)
    model.save_pretrained(out)
    return names


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_columns_are_those_of_transformers_own_run(originals, name):
    """Every family, in sequences of 64 tokens or, where positions have no limit, of 1,024."""
    folder = originals[name]
    spec = spec_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    largest: dict[str, torch.Tensor] = {}
    for path, linear in model.named_modules():
        if isinstance(linear, nn.Linear):

            def note(module, arguments, path=path):
                absmax = arguments[0].flatten(0, -2).abs().amax(0)
                largest[path] = torch.maximum(largest.get(path, absmax), absmax)

            linear.register_forward_pre_hook(note)
    ids = make_calibration(folder, spec, "random", 16).token_ids
    for window in ids.split(min(1024, spec.max_positions or 1024)):
        model(window[None])
    found = columns_of(folder, head=True)
    sources = tensor_sources(spec, range(spec.num_blocks), first=False, last=True)
    assert {f"{linear}.weight" for linear in found} == {
        target for target, s in sources.items() if len(s.shapes[0]) == 2 and "project" not in target
    }
    assert found == columns_of(folder) | {"lm_head": found["lm_head"]}
    for linear, columns in found.items():
        names = [n.removesuffix(".weight") for n in sources[f"{linear}.weight"].names[0]]
        names += ["lm_head", "embed_out"] if linear == "lm_head" else []  # a tied one's other name
        absmax = next(largest[path] for path in names if path in largest)
        assert len(set(columns)) == 16 and columns == sorted(columns)
        rest = torch.ones_like(absmax, dtype=torch.bool)
        rest[columns] = False
        assert absmax[columns].min() >= absmax[rest].max() * (1 - 1e-5)


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_neox"])
def test_outlier_features_are_found_and_lose_nothing(originals, tmp_path, name):
    names = features(originals[name], tmp_path / "hard")
    found = columns_of(tmp_path / "hard")
    for norm, channels in names.items():
        index = next(part for part in norm.split(".") if part.isdigit())
        linear = "up" if "post_attention" in norm and name != "llama" else "qkv"
        linear = "gate_up" if "post_attention" in norm and name == "llama" else linear
        assert set(channels.tolist()) <= set(found[f"blocks.{index}.{linear}"])
    spec = spec_of(tmp_path / "hard")
    ids = torch.arange(40)

    def error(**options):
        stage = load_stage(tmp_path / "hard", spec, range(spec.num_blocks), **EDGES, **options)
        return float((logits(stage, ids) - exact).norm() / exact.norm())

    exact = torch.zeros(1)
    exact = logits(
        load_stage(originals[name], spec, range(spec.num_blocks), **EDGES, int8=False), ids
    )
    naive, hot = error(outlier_rule="none"), error(outlier_rule="none", hot_columns=found)
    assert hot < naive / 3
    two_planes = error(outlier_rule="all")
    assert error(outlier_rule="all", hot_columns=found) < two_planes / 1.2


def test_each_stage_finds_its_own(originals):
    whole = columns_of(originals["llama"])
    read = []
    part = columns_of(originals["llama"], blocks=range(1, 2), progress=read.append)
    assert part == {name: c for name, c in whole.items() if name.startswith("blocks.1.")}
    skipped = columns_of(originals["llama"], skip=["down", "blocks.2"])
    kept = {n: c for n, c in whole.items() if not n.endswith("down") and "blocks.2" not in n}
    assert skipped == kept
    assert columns_of(originals["llama"], head=True, skip=["lm_head"]) == whole
    last = columns_of(originals["llama"], head=True, blocks=range(1, 1))
    assert list(last) == ["lm_head"]
    assert all(len(columns) == 48 for columns in columns_of(originals["llama"], 48).values())
    with pytest.raises(ValueError, match="at most the 48 input features of the narrowest"):
        columns_of(originals["llama"], 64)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_quantize_calibrates_as_load_does(originals, tmp_path, name):
    original = originals[name]
    job = quantize(original, tmp_path / "int8", calibrate="random", shard_bytes=30_000)
    progress = []
    assert job.run(progress.append) and job.num_bytes_read > 0
    assert sum(progress) == job.num_bytes_read + job.num_bytes
    spec = spec_of(original)
    blocks = range(spec.num_blocks)
    direct = load_stage(original, spec, blocks, **EDGES, hot_columns=columns_of(original))
    stored = load_stage(tmp_path / "int8", spec, blocks, **EDGES)
    assert same(direct.state_dict(), stored.state_dict())
    assert stored_format(tmp_path / "int8", spec).num_hot_columns == 16
    assert stored_format(tmp_path / "int8", spec).linear_size == 4
    config = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert (config["num_hot_columns"], config["calibrate"]) == (16, "random")
    again = quantize(original, tmp_path / "again", calibrate="random", shard_bytes=30_000)
    assert again.run()
    for path in (tmp_path / "int8").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    quantize(tmp_path / "int8", tmp_path / "copy", shard_bytes=30_000).run()
    copied = load_stage(tmp_path / "copy", spec, blocks, **EDGES)
    assert same(copied.state_dict(), stored.state_dict())
    assert (
        json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"] == config
    )


def test_an_interrupted_run_keeps_what_it_found(originals, tmp_path):
    """The rerun writes the same bytes and takes the columns that lie aside."""

    def job(out, **options):
        return quantize(originals["llama"], out, calibrate="random", shard_bytes=40_000, **options)

    job(tmp_path / "clean").run()
    written = []

    def stop(num_bytes):
        written.append(num_bytes)
        if sum(written) > job(tmp_path / "out").num_bytes_read + 90_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(tmp_path / "out").run(stop)
    aside = tmp_path / ".out.partial"
    kept = aside / "hot_columns.json"
    assert json.loads(kept.read_text()) == columns_of(originals["llama"])
    shutil.copytree(aside, tmp_path / ".other.partial")
    notes, progress = [], []
    resumed = job(tmp_path / "out")
    assert resumed.run(progress.append, notes.append) and "continuing behind" in notes[0]
    assert sum(progress) == resumed.num_bytes_read + resumed.num_bytes
    for path in (tmp_path / "clean").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    # other options start over, and calibrate again
    other = quantize(
        originals["llama"],
        tmp_path / "other",
        calibrate="random",
        num_hot_columns=32,
        shard_bytes=40_000,
    )
    assert other.run(note=notes.append) and "starting over" in notes[-1]
    assert stored_format(tmp_path / "other", spec_of(originals["llama"])).num_hot_columns == 32


def test_a_text_is_read_by_the_models_tokenizer(tiny_llama, tmp_path):
    spec = spec_of(tiny_llama)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 200)
    calibration = make_calibration(tiny_llama, spec, str(text), 16)
    assert calibration.token_ids.shape == (1024,) and calibration.source.startswith("text ")
    assert calibration.token_ids[:5].tolist() == calibration.token_ids[18:23].tolist()
    assert find_hot_columns(tiny_llama, spec, calibration).keys() == columns_of(tiny_llama).keys()
    assert make_calibration(tiny_llama, spec, "off", 16) is None
    assert make_calibration(tiny_llama, spec, "random", 0) is None
    text.write_text("")
    with pytest.raises(ValueError, match=r"a file with text, got .* without a token"):
        make_calibration(tiny_llama, spec, str(text), 16)
    with pytest.raises(ValueError, match="must be random, off or a text file, got '/no/such"):
        make_calibration(tiny_llama, spec, "/no/such", 16)


def test_a_text_without_a_tokenizer_is_refused(originals, tmp_path):
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ValueError, match="must hold a tokenizer to read a text"):
        quantize(originals["llama"], tmp_path / "out", calibrate=str(tmp_path / "text.txt"))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt"])
@pytest.mark.parametrize("embedding_int8", [False, True])
def test_a_head_in_int8_has_its_own(originals, tmp_path, name, embedding_int8):
    """In the checkpoint, a copy and back in floating point; a tied embedding stays whole."""
    original = originals[name]
    spec = spec_of(original)
    blocks = range(spec.num_blocks)
    options = {"skip": (), "embedding_int8": embedding_int8, "shard_bytes": 30_000}
    quantize(original, tmp_path / "int8", calibrate="random", **options).run()
    found = columns_of(original, head=True)
    floating = load_stage(original, spec, blocks, **EDGES, int8=False)
    direct = load_stage(
        original, spec, blocks, **EDGES, skip=(), embedding_int8=embedding_int8, hot_columns=found
    )
    stored = load_stage(tmp_path / "int8", spec, blocks, **EDGES)
    assert same(direct.state_dict(), stored.state_dict())
    columns = found["lm_head"]
    assert stored.lm_head.hot_columns.tolist() == columns
    assert torch.equal(stored.lm_head.hot_weight, floating.lm_head.weight[:, columns])
    assert stored_format(tmp_path / "int8", spec).head_hot_columns == 16
    if embedding_int8:
        table = reference.dequantize_weight(*reference.quantize_weight(floating.embedding.weight))
        assert torch.equal(stored.embedding(torch.arange(30), torch.float32), table[:30])
    else:
        assert torch.equal(stored.embedding.weight, floating.embedding.weight)
    quantize(tmp_path / "int8", tmp_path / "copy", shard_bytes=30_000).run()
    copied = load_stage(tmp_path / "copy", spec, blocks, **EDGES)
    assert same(copied.state_dict(), stored.state_dict())
    lose(tmp_path / "copy", "lm_head.hot_columns", "lm_head.hot_weight")
    with pytest.raises(ValueError, match=r"hot_weight must have 16 columns, as config\.json"):
        load_stage(tmp_path / "copy", spec, blocks, **EDGES)
    dequantize(tmp_path / "int8", tmp_path / "floating", dtype="float32").run()
    restored = load_stage(tmp_path / "floating", spec, blocks, **EDGES, int8=False)
    assert torch.equal(restored.lm_head.weight, stored.lm_head.dequantize())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hot_columns": {"blocks.0.qkv": [1]}}, "calibrate must be off where hot_columns"),
        ({"target": "bitsandbytes"}, "hot_columns must be left out for bitsandbytes"),
    ],
)
def test_contradictions_are_refused(originals, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(originals["llama"], tmp_path / "out", calibrate="random", **options)
    quantize(originals["llama"], tmp_path / "int8").run()
    with pytest.raises(ValueError, match="must be chosen when a checkpoint is quantized"):
        quantize(tmp_path / "int8", tmp_path / "out", calibrate="random")


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt"])
@pytest.mark.parametrize("skip", [(), ("lm_head",)])
def test_an_int8_embedding_and_head(originals, tmp_path, name, skip):
    original = originals[name]
    spec = spec_of(original)
    blocks = range(spec.num_blocks)
    floating = load_stage(original, spec, blocks, **EDGES, int8=False)
    stage = load_stage(original, spec, blocks, **EDGES, skip=skip, embedding_int8=True)
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
    stage = load_stage(original, spec, blocks, **EDGES, skip=skip, embedding_int8=True)
    stored = load_stage(tmp_path / "int8", spec, blocks, **EDGES)
    assert same(stored.state_dict(), stage.state_dict())
    assert torch.equal(logits(stored, ids), logits(stage, ids))
    assert stored_format(tmp_path / "int8", spec).embedding_int8
    made = random_stage(spec, blocks, **EDGES, skip=skip, embedding_int8=True, num_hot_columns=16)
    assert made.blocks["0"].qkv.hot_columns.tolist() == list(range(16))
    assert logits(made, ids).isfinite().all()
    hot = set() if skip else {"hot_columns", "hot_weight"}
    assert set(made.lm_head.state_dict()) == set(stage.lm_head.state_dict()) | hot
    dequantize(tmp_path / "int8", tmp_path / "floating", dtype="float32").run()
    restored = load_stage(tmp_path / "floating", spec, blocks, **EDGES, int8=False)
    expected = reference.dequantize_weight(weight_int8, col_scale)
    assert torch.equal(restored.embedding.weight, expected)
    head = floating.lm_head.weight if skip else stage.lm_head.dequantize()
    assert torch.equal(restored.lm_head.weight, head)
    if not (spec.tied_head and not skip):
        quantize(tmp_path / "int8", tmp_path / "bnb", target="bitsandbytes").run()
        theirs = load_stage(tmp_path / "bnb", spec, blocks, **EDGES)
        assert torch.equal(theirs.embedding.weight, expected)
