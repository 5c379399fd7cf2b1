"""`dist-int8 eval` as a user calls it: figures, JSON, pictures, errors."""

import json
import sys

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from dist_int8.checkpoint import find_hot_columns, make_calibration
from dist_int8.checkpoint.writer import quantize
from dist_int8.cli import app
from dist_int8.config import load_settings
from dist_int8.evaluation.host import Host
from dist_int8.evaluation.layers import hot_columns, watch_layers
from dist_int8.evaluation.methods import DEFAULT, METHODS, chosen
from dist_int8.evaluation.texts import calibration_text, read_text
from dist_int8.models import describe, load_config

TEXT = "The quick brown fox jumps over the lazy dog and runs away from it. " * 6  # 402 bytes


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(capfd, *arguments):
    code = app.run(["eval", *map(str, arguments)])
    return code, capfd.readouterr()


def as_json(capfd, *arguments):
    code, shown = run(capfd, *arguments, "--json", "--threads", 1)
    assert code == 0, shown.err
    return json.loads(shown.out)


def test_figures_of_several_methods(capfd, tiny_llama, text):
    methods = ["transformers", "absmax", "llm.int8", "smoothquant", "all+hot", "ours", "ours-head"]
    found = as_json(
        capfd, "-m", tiny_llama, "--text", text, "--methods", ",".join(methods),
        "--window", 128, "--stride", 96, "--batch", 2, "--layer-tokens", 64,
    )  # fmt: skip
    assert found["num_tokens"] == len(TEXT) and found["num_targets"] == len(TEXT) - 1
    assert (found["window"], found["stride"], found["reference"]) == (128, 96, "fp32")
    assert list(found["methods"]) == ["fp32", *methods]
    for name, method in found["methods"].items():
        assert len(method["windows"]["loss"]) == 4  # 128, 96, 96 and the rest
        assert sum(method["windows"]["num_targets"]) == len(TEXT) - 1
        assert method["perplexity"] > 1 and method["tokens_per_s"] > 0
        if name == "fp32":
            assert "divergence" not in method
            continue
        assert method["where"] == METHODS[name].where
        assert method["divergence"] > -1e-6 and 0 < method["agreement_percent"] <= 100
        errors = found["layer_errors"][name]
        assert len(errors) == 4 * 7 and method["layer_error"]["worst"] == max(errors.values())
    same = found["methods"]["transformers"]
    assert same["divergence"] < 1e-8 and abs(same["change_percent"]) < 1e-3
    assert same["agreement_percent"] == 100 and same["layer_error"]["worst"] < 1e-6
    of = {name: method.get("divergence") for name, method in found["methods"].items()}
    assert of["all+hot"] < of["ours"] < of["absmax"] and of["ours"] < of["ours-head"]
    plane = {
        n: found["methods"][n]["layer_error"]["second_plane_percent"] for n in ("ours", "all+hot")
    }
    assert plane["ours"]["elements"] == 0 < plane["all+hot"]["elements"]
    assert len(found["inputs"]) == 4 * 4 and len(found["inputs"][0]["linears"]) == 3


def test_windows_are_the_same_alone_and_together_on_stages_and_in_groups(capfd, tiny_llama, text):
    base = ["-m", tiny_llama, "--text", text, "--window", 64, "--layer-tokens", 0]
    one = as_json(capfd, *base, "--methods", "ours,row-wise,none")
    groups = as_json(capfd, *base, "--methods", "ours,row-wise,none", "--at-once", 1)
    stages = as_json(
        capfd, *base, "--methods", "ours", "--batch", 3, "--stages", 2, "--reference", "none"
    )
    for name, method in one["methods"].items():
        assert groups["methods"][name]["windows"] == method["windows"]
        if name in stages["methods"]:
            again = stages["methods"][name]["windows"]
            assert again["num_targets"] == method["windows"]["num_targets"]
            assert again["loss"] == pytest.approx(method["windows"]["loss"], rel=1e-6)


def test_injected_features_change_int8_and_not_floating_point(capfd, tiny_llama, text):
    base = ["-m", tiny_llama, "--text", text, "--window", 128, "--layer-tokens", 64]
    base += ["--methods", "vector-wise,all+hot"]
    plain = as_json(capfd, *base)
    hard = as_json(capfd, *base, "--inject-outliers", 3)
    assert plain["outlier_features_seed"] is None and hard["outlier_features_seed"] == 3
    assert hard["methods"]["fp32"]["perplexity"] == pytest.approx(
        plain["methods"]["fp32"]["perplexity"], rel=1e-5
    )
    kl = {
        n: [r["methods"][n]["divergence"] for r in (plain, hard)]
        for n in ("vector-wise", "all+hot")
    }
    assert kl["vector-wise"][1] > 5 * kl["vector-wise"][0]
    assert kl["all+hot"][1] < 2 * kl["all+hot"][0]
    counts = [sum(i["num_outlier_features"] for i in r["inputs"]) for r in (plain, hard)]
    assert counts[1] > counts[0]


def test_a_folder_of_texts_without_a_reference(capfd, tiny_llama, tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("b" * 100)
    (folder / "sub" / "c.txt").write_text("c" * 100)
    (folder / "a.bin").write_bytes(b"\xff\xfe")
    (folder / ".hidden").write_text("h" * 100)
    code, shown = run(
        capfd, "-m", tiny_llama, "--text", folder, "--window", 64, "--methods", "ours",
        "--reference", "none", "--layer-tokens", 0, "--threads", 1,
    )  # fmt: skip
    assert code == 0 and "200 tokens of" in shown.out and "KL" not in shown.out.splitlines()[0]
    assert read_text(folder)[0] == "b" * 100 + "\n" + "c" * 100


def test_a_table_and_a_picture(capfd, tiny_llama, text, tmp_path):
    picture = tmp_path / "eval.png"
    code, shown = run(
        capfd, "-m", tiny_llama, "--text", text, "--window", 128, "--methods", "absmax,ours",
        "--plot", picture, "--threads", 1, "-q",
    )  # fmt: skip
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    lines = shown.out.splitlines()
    assert lines[0].startswith("method") and lines[1].startswith("fp32, floating point")
    assert "ours, as set" in lines[3] and "401 tokens of" in shown.out


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--plot", "no/where.png"], "got 'no/where.png' (no folder "),
        (["--plot", "."], "got '.' (another ending than .png"),
        (["--plot", "picture.txt"], "got 'picture.txt' (another ending than"),
        (
            ["--tasks", "plays_cloze", "--methods", "absmax"],
            "methods must be left out with --tasks",
        ),
        (["--tasks", "plays_cloze", "--plot", "x.png"], "plot must be left out with --tasks"),
        (["--inject-outliers", 2**70], "inject_outliers must be a seed in 0..2^63-1"),
    ],
)
def test_contradicting_flags_are_refused(capfd, tiny_llama, flags, part):
    code, shown = run(capfd, "-m", tiny_llama, *flags)
    assert code == 2 and part in shown.err and shown.err.count("\n") == 1


def test_missing_matplotlib_is_reported_before_measuring(
    capfd, tiny_llama, text, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, shown = run(capfd, "-m", tiny_llama, "--text", text, "--plot", tmp_path / "x.png")
    assert code == 2 and "matplotlib must be installed" in shown.err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--text no-such-file", "text must be a file or a folder that can be read"),
        ("--text EMPTY", "text must have words in it, got nothing"),
        ("--text SHORT --window 128", "text must be longer than a window of 128 tokens, got 5"),
        ("--methods absmax,foo", "methods must be among"),
        ("--methods ours,ours", "methods must be distinct"),
        ("--methods ,", "methods must be among"),
        ("--window 64 --stride 65", "stride must be 1 to the window of 64 tokens, got 65"),
        ("--window 1024", "window must be at most the model's 256 positions, got 1024"),
        ("--reference fp8", "reference must be fp32, bf16 or none"),
        ("--batch 0", "batch must be at least 1"),
        ("--tokens 1", "tokens must be at least 2"),
        ("--calibration-text no-such-file", "text must be a file"),
    ],
)
def test_bad_input_is_one_line(capfd, tiny_llama, tmp_path, flags, part):
    for name, content in (("EMPTY", " \n"), ("SHORT", "hello"), ("LONG", TEXT)):
        (tmp_path / name).write_text(content)
        flags = flags.replace(name, str(tmp_path / name))
    if "--text" not in flags:  # a short one
        flags += f" --text {tmp_path / 'LONG'}"
    code, shown = run(capfd, "-m", tiny_llama, *flags.split())
    assert code == 2 and shown.out == "" and shown.err.count("\n") == 1, shown.err
    assert shown.err.startswith("error: ") and part in shown.err


def test_an_int8_checkpoint_is_for_the_runtime_alone(capfd, tiny_llama, text, tmp_path):
    """transformers would take its int8 values for weights."""
    quantize(tiny_llama, tmp_path / "int8").run()
    options = ["-m", tmp_path / "int8", "--text", text, "--window", 128, "--threads", 1]
    for flags in (
        ["--methods", "ours,vector-wise", "--layer-tokens", 0],
        ["--methods", "ours"],
        ["--methods", "ours", "--layer-tokens", 0, "--inject-outliers", 0],
    ):
        code, shown = run(capfd, *options, *flags)
        assert code == 2 and "must be a floating-point checkpoint for what tran" in shown.err
    found = as_json(capfd, *options[:-2], "--methods", "ours", "--layer-tokens", 0)
    assert abs(found["methods"]["ours"]["change_percent"]) < 5


def test_logits_that_are_not_finite(capfd, tiny_llama, text, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.norm.weight[3] = 3e38  # times 1.2 it leaves fp32
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "nan")
    options = ["-m", tmp_path / "nan", "--text", text, "--window", 128, "--layer-tokens", 0]
    found = as_json(capfd, *options, "--methods", "ours")
    assert found["methods"]["ours"]["agreement_percent"] is None
    assert found["methods"]["ours"]["perplexity"] is None
    code, shown = run(capfd, *options, "--methods", "ours", "--threads", 1)
    assert code == 0 and "not finite" in shown.out
    picture = tmp_path / "eval.png"
    code, shown = run(capfd, *options, "--methods", "ours", "--threads", 1, "--plot", picture)
    assert code == 0 and "not finite" in shown.out and picture.stat().st_size


def test_quiet_shows_no_progress(capfd, tiny_llama, text):
    options = ["--text", text, "--window", 128, "--methods", "ours,vector-wise", "-q"]
    code, shown = run(capfd, "-m", tiny_llama, *options, "--inject-outliers", 0, "--kv", "int8")
    assert code == 0 and "vector-wise" in shown.out
    assert not any(bar in shown.err for bar in ("it/s", "Loading weights", "Writing"))


def test_missing_model_and_missing_package(capfd, monkeypatch):
    code, shown = run(capfd)
    assert code == 2 and "model must be a folder or a hub id" in shown.err
    found = {"torchao": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.get(name, name))
    assert "torchao" not in chosen(None) and "ours" in chosen(None)
    with pytest.raises(ValueError, match="method torchao needs torchao installed"):
        chosen(["torchao"])
    assert set(DEFAULT) <= set(METHODS)


def test_list_methods(capfd):
    code, shown = run(capfd, "--list-methods")
    assert code == 0 and [line.split()[0] for line in shown.out.splitlines()] == list(METHODS)


def test_calibration_text_shares_no_line_with_the_default_text():
    topics, docstrings = read_text(None)[0], calibration_text(None)[0]
    assert len(docstrings) > 50_000
    lines = {line.strip() for line in topics.splitlines() if len(line.strip()) > 50}
    shared = [line for line in docstrings.splitlines() if line.strip() in lines]
    assert not shared


def test_hot_columns_are_found_under_the_names_of_linears(tiny_llama):
    settings = load_settings(None, model=str(tiny_llama), calibrate="random")
    spec = describe(load_config(tiny_llama))
    host = Host(tiny_llama)
    named = hot_columns(tiny_llama, spec, settings, host.linears)
    found = find_hot_columns(tiny_llama, spec, make_calibration(tiny_llama, spec, "random", 16, 64))
    assert set(named) == set(host.linears)
    assert named["model.layers.2.self_attn.k_proj"] == found["blocks.2.qkv"]
    assert named["model.layers.3.mlp.down_proj"] == found["blocks.3.down"]
    assert len(found["blocks.2.qkv"]) == 16 < len(found["blocks.3.down"])


def test_layers_are_measured_against_floating_point(tiny_llama):
    host = Host(tiny_llama)
    name = "model.layers.1.mlp.up_proj"
    seen = {}
    host.linears[name].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))

    def half(linear_name, linear):
        def layer(x):
            return 0.5 * torch.nn.functional.linear(x, linear.weight, linear.bias)

        return layer

    report = watch_layers(host, torch.arange(50), {"half": half})
    assert set(report.errors["half"]) == set(host.linears)
    assert all(error == pytest.approx(0.5, rel=1e-5) for error in report.errors["half"].values())
    inputs = next(inputs for inputs in report.inputs if name in inputs.names)
    assert inputs.names == ["model.layers.1.mlp.gate_proj", name]
    x = seen["x"][0]
    assert torch.equal(inputs.absmax, x.abs().amax(0))
    assert torch.equal(inputs.share, (x.abs() >= 6).float().mean(0))
    assert inputs.rms == pytest.approx(x.square().mean(1).sqrt().median().item())
