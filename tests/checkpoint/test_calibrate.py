"""Hot columns found by calibration: the right ones, in bounded memory, the same after a kill."""

import json
import shutil

import pytest
import torch
from tiny_models import (
    assert_same_stage,
    compute_logits,
    find_tiny_columns,
    load_tiny_stage,
    read_spec,
)
from torch import nn
from transformers import AutoModelForCausalLM

from dist_int8.checkpoint import find_hot_columns, make_calibration, read_stored_format
from dist_int8.checkpoint.writer import quantize
from dist_int8.evaluation.outlier_features import inject_outlier_features
from dist_int8.models import StageSlice, tensor_sources

MODELS = ["llama", "llama_tied", "bloom", "opt", "gpt_neox"]


def features(folder, out):
    """The model with outlier features in its norms' outputs, and transformers' names of them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = inject_outlier_features(model, seed=3)
    model.save_pretrained(out)
    return names


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_columns_are_the_inputs_of_transformers_linears_with_the_most_energy(originals, name):
    """Every family, in sequences of 64 tokens or, where positions have no limit, of 1,024."""
    folder = originals[name]
    spec = read_spec(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    energies: dict[str, torch.Tensor] = {}
    for path, linear in model.named_modules():
        if isinstance(linear, nn.Linear):

            def note(module, arguments, path=path):
                energy = arguments[0].flatten(0, -2).double().square().sum(0)
                energies[path] = energies.get(path, 0) + energy

            linear.register_forward_pre_hook(note)
    ids = make_calibration(folder, spec, "random", 16).token_ids
    for window in ids.split(min(1024, spec.max_positions or 1024)):
        model(window[None])
    found = find_tiny_columns(folder, stage_slice=StageSlice.whole(spec))
    sources = tensor_sources(spec, StageSlice(range(spec.num_blocks), first=False, last=True))
    assert {f"{linear}.weight" for linear in found} == {
        target for target, s in sources.items() if len(s.shapes[0]) == 2 and "project" not in target
    }
    assert found == find_tiny_columns(folder) | {"lm_head": found["lm_head"]}
    for linear, columns in found.items():
        names = [n.removesuffix(".weight") for n in sources[f"{linear}.weight"].names[0]]
        names += ["lm_head", "embed_out"] if linear == "lm_head" else []  # a tied one's other name
        energy = next(energies[path] for path in names if path in energies)
        assert len(set(columns)) == 16 and columns == sorted(columns)
        rest = torch.ones_like(energy, dtype=torch.bool)
        rest[columns] = False
        assert energy[columns].min() >= energy[rest].max() * (1 - 1e-5)


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_neox"])
def test_outlier_features_are_found_and_keep_their_accuracy(originals, tmp_path, name):
    names = features(originals[name], tmp_path / "hard")
    found = find_tiny_columns(tmp_path / "hard")
    for norm, channels in names.items():
        index = next(part for part in norm.split(".") if part.isdigit())
        linear = "up" if "post_attention" in norm and name != "llama" else "qkv"
        linear = "gate_up" if "post_attention" in norm and name == "llama" else linear
        assert set(channels.tolist()) <= set(found[f"blocks.{index}.{linear}"])
    ids = torch.arange(40)

    def error(**options):
        stage = load_tiny_stage(tmp_path / "hard", **options)
        return float((compute_logits(stage, ids) - exact).norm() / exact.norm())

    exact = torch.zeros(1)
    exact = compute_logits(load_tiny_stage(originals[name], int8=False), ids)
    naive, hot = error(outlier_rule="none"), error(outlier_rule="none", hot_columns=found)
    assert hot < naive / 3
    two_planes = error(outlier_rule="all")
    assert error(outlier_rule="all", hot_columns=found) < two_planes / 1.2


def test_a_stage_finds_the_columns_of_its_own_linears(originals):
    folder = originals["llama"]
    whole = find_tiny_columns(folder)
    middle = StageSlice(range(1, 2), first=False, last=False)
    part = find_tiny_columns(folder, stage_slice=middle)
    assert part == {name: c for name, c in whole.items() if name.startswith("blocks.1.")}
    without_blocks = StageSlice(range(1, 1), first=False, last=True)
    assert list(find_tiny_columns(folder, stage_slice=without_blocks)) == ["lm_head"]


def test_skipped_linears_have_no_columns(originals):
    folder = originals["llama"]
    whole = find_tiny_columns(folder)
    skipped = find_tiny_columns(folder, skip=["down", "blocks.2"])
    kept = {n: c for n, c in whole.items() if not n.endswith("down") and "blocks.2" not in n}
    assert skipped == kept
    with_head = StageSlice.whole(read_spec(folder))
    assert find_tiny_columns(folder, stage_slice=with_head, skip=["lm_head"]) == whole


def test_there_are_at_most_as_many_columns_as_input_features(originals):
    folder = originals["llama"]
    assert all(len(columns) == 48 for columns in find_tiny_columns(folder, 48).values())
    narrow, wide = 48, max(block.intermediate_size for block in read_spec(folder).blocks)
    counts = {len(columns) for columns in find_tiny_columns(folder, wide).values()}
    assert counts == {narrow, wide}
    with pytest.raises(ValueError, match=f"at most the {wide} input features of the widest"):
        find_tiny_columns(folder, wide + 1)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_quantize_calibrates_as_load_does(originals, tmp_path, name):
    original = originals[name]
    job = quantize(original, tmp_path / "int8", calibrate="random", shard_bytes=30_000)
    progress = []
    assert job.run(progress.append) and job.num_bytes_read > 0
    assert sum(progress) == job.num_bytes_read + job.num_bytes
    spec = read_spec(original)
    direct = load_tiny_stage(original, hot_columns=find_tiny_columns(original))
    stored = load_tiny_stage(tmp_path / "int8")
    assert_same_stage(direct, stored)
    assert read_stored_format(tmp_path / "int8", spec).num_hot_columns == 16
    assert read_stored_format(tmp_path / "int8", spec).linear_size == 4
    config = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert (config["num_hot_columns"], config["calibrate"]) == (16, "random")
    again = quantize(original, tmp_path / "again", calibrate="random", shard_bytes=30_000)
    assert again.run()
    for path in (tmp_path / "int8").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    quantize(tmp_path / "int8", tmp_path / "copy", shard_bytes=30_000).run()
    copied = load_tiny_stage(tmp_path / "copy")
    assert_same_stage(copied, stored)
    assert (
        json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"] == config
    )


def test_an_interrupted_run_keeps_the_columns_it_found(originals, tmp_path):
    """The rerun writes the same bytes and takes over the columns found before."""

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
    assert json.loads(kept.read_text()) == find_tiny_columns(originals["llama"])
    shutil.copytree(aside, tmp_path / ".other.partial")
    notes, progress = [], []
    resumed = job(tmp_path / "out")
    assert resumed.run(progress.append, notes.append) and "continuing after" in notes[0]
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
    assert (
        read_stored_format(tmp_path / "other", read_spec(originals["llama"])).num_hot_columns == 32
    )


def test_a_text_is_read_by_the_models_tokenizer(tiny_llama, tmp_path):
    spec = read_spec(tiny_llama)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 200)
    calibration = make_calibration(tiny_llama, spec, str(text), 16)
    assert calibration.token_ids.shape == (1024,) and calibration.source.startswith("text ")
    assert calibration.token_ids[:5].tolist() == calibration.token_ids[18:23].tolist()
    found = find_hot_columns(tiny_llama, spec, calibration)
    assert found.keys() == find_tiny_columns(tiny_llama).keys()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hot_columns": {"blocks.0.qkv": [1]}}, "calibrate must be off where hot_columns"),
        ({"target": "bitsandbytes"}, "hot_columns must be left out for bitsandbytes"),
    ],
)
def test_hot_columns_that_contradict_other_arguments_are_refused(
    originals, tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        quantize(originals["llama"], tmp_path / "out", calibrate="random", **options)
    quantize(originals["llama"], tmp_path / "int8").run()
    with pytest.raises(ValueError, match="must be chosen when a checkpoint is quantized"):
        quantize(tmp_path / "int8", tmp_path / "out", calibrate="random")
