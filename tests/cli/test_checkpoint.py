"""`dist-int8 quantize`, `dequantize` and `verify`: output, exit codes, and a model that runs."""

import json

import pytest

import dist_int8
from dist_int8.cli import app


def run(capsys, *arguments):
    code = app.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_quantize_and_dequantize_round_trip(tiny_llama, tmp_path, capsys):
    int8, bnb, again = tmp_path / "int8", tmp_path / "bnb", tmp_path / "again"
    plain = (tiny_llama, "--rotation", 0, "--calibrate", "off")  # bitsandbytes has neither
    code, out, _ = run(capsys, "quantize", *plain, int8, "--shard-size", "100KB", "--verify")
    assert code == 0 and "files are as they were written" in out
    assert {path.name for path in int8.iterdir()} >= {"tokenizer.json", "SHA256SUMS"}
    code, _, err = run(capsys, "quantize", *plain, int8, "--shard-size", "100KB")
    assert code == 0 and "complete already" in err
    assert run(capsys, "quantize", int8, bnb, "--format", "bitsandbytes", "-q") == (0, "", "")
    code, out, _ = run(capsys, "dequantize", bnb, again, "--dtype", "bfloat16")
    assert code == 0 and out.startswith(f"{again}: 1 file, ")
    config = json.loads((again / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    assert run(capsys, "verify", again)[0] == 0
    answers = []
    for folder in (int8, bnb):
        with dist_int8.load(folder, devices=["cpu"], max_tokens=32, progress=False) as model:
            answers.append(model.generate("Hi", max_new_tokens=4)[0].token_ids)
    assert answers[0] == answers[1]
    shard = next(int8.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, out, err = run(capsys, "verify", int8)
    assert code == 2 and f"{shard.name} has changed" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["quantize", "MODEL", "OUT", "--format", "gguf"], "format must be one of dist_int8"),
        (["quantize", "MODEL", "OUT", "--shard-size", "big"], "--shard-size must be a byte size"),
        (["quantize", "MODEL", "OUT", "--hot-columns", "/no.json"], "must be a JSON file"),
        (["quantize", "/no/such", "OUT"], "no such folder"),
        (["quantize", "MODEL", "OUT", "--num-hot-columns", "7"], "must be a multiple of 16, got 7"),
        (["quantize", "MODEL", "OUT", "--embedding", "int4"], "embedding must be 'int8' or"),
        (["quantize", "MODEL", "OUT", "--calibrate", "/no.txt"], "off or a text file, got"),
        (["quantize", "MODEL", "MODEL"], "OUT must be a new folder"),
        (["quantize", "MODEL"], "Missing argument 'OUT'"),
        (["dequantize", "MODEL", "OUT"], "must have int8 weights, got none"),
        (["dequantize", "MODEL", "OUT", "--dtype", "int4"], "must have int8 weights"),
        (["verify", "MODEL"], "must hold a manifest"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny_llama, tmp_path, capsys, arguments, part):
    places = {"MODEL": str(tiny_llama), "OUT": str(tmp_path / "out")}
    code, out, err = run(capsys, *(places.get(word, word) for word in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
    assert part in err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_exit_code_1(tiny_llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    code, _, err = run(capsys, "quantize", tiny_llama, tmp_path / "out")
    assert code == 1 and "bytes free, got 10" in err
    # with room on the disk, the same arguments continue
    monkeypatch.undo()
    assert run(capsys, "quantize", tiny_llama, tmp_path / "out")[0] == 0


def test_verify_gives_its_verdict_quietly_too(tiny_llama, tmp_path, capsys):
    assert run(capsys, "quantize", tiny_llama, tmp_path / "int8", "-q")[0] == 0
    code, out, err = run(capsys, "verify", tmp_path / "int8", "-q")
    assert (code, err) == (0, "") and out.endswith("files are as they were written\n")


def test_hot_columns_from_a_file(tiny_llama, tmp_path, capsys):
    path = tmp_path / "hot.json"
    path.write_text('{"blocks.0.qkv": [1, 2]}')
    assert run(capsys, "quantize", tiny_llama, tmp_path / "out", "--hot-columns", path)[0] == 0
    path.write_text('{"blocks.0.qkv": 1}')
    code, _, err = run(capsys, "quantize", tiny_llama, tmp_path / "x", "--hot-columns", path)
    assert code == 2 and "must map names of linears to lists" in err


def test_quantize_finds_hot_columns_unless_told_not_to(tiny_llama, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 100)

    def config(name, *flags):
        code, _, err = run(capsys, "quantize", tiny_llama, tmp_path / name, "-q", *flags)
        assert (code, err) == (0, "")
        return json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]

    default = config("default")
    assert (default["calibrate"], default["num_hot_columns"]) == ("random", 16)
    assert default["down_hot_columns"] == 64
    assert default["skip_modules"] == ["lm_head"] and "embedding" not in default
    assert "calibrate" not in config("off", "--calibrate", "off")
    assert "calibrate" not in config("none", "--num-hot-columns", 0)
    assert "calibrate" not in config("bnb", "--format", "bitsandbytes")
    code, _, err = run(capsys, "quantize", tiny_llama, tmp_path / "x", "--num-hot-columns", 800)
    assert code == 2 and "input features of the widest linear, got 800; use 16" in err
    assert not (tmp_path / "x").exists()
    small = config("small", "--calibrate", text, "--head", "int8", "--embedding", "int8")
    assert small["calibrate"].startswith("text ") and small["skip_modules"] == []
    assert small["embedding"] == "int8"
    code, _, err = run(capsys, "quantize", tmp_path / "off", tmp_path / "copy", "-q")
    assert (code, err) == (0, "")


def test_a_named_point_decides_what_is_written_and_is_remembered(tiny_llama, tmp_path, capsys):
    def config(name, *flags):
        code, _, err = run(capsys, "quantize", tiny_llama, tmp_path / name, "-q", *flags)
        assert (code, err) == (0, "")
        return json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]

    def refusal(*arguments):
        code, _, err = run(capsys, "quantize", *arguments, tmp_path / "x", "-q")
        assert code == 2 and not (tmp_path / "x").exists()
        return err

    def held(name, **settings):
        options = {"devices": ["cpu"], "max_tokens": 32, "threads_per_stage": 1, "progress": False}
        with dist_int8.load(tmp_path / name, **options, **settings) as model:
            chosen = model.settings
            return chosen.rotation, chosen.outlier_rule, chosen.outlier_threshold

    default = config("default")
    assert (default["version"], default["rotation"]) == (2, 64) and "accuracy" not in default
    assert held("default") == (64, "none", 0.0)
    paper = config("paper", "--accuracy", "paper")
    assert (paper["version"], paper["accuracy"]) == (1, "paper")
    assert "rotation" not in paper and "calibrate" not in paper
    assert held("paper") == (0, "absolute", 6.0)
    assert held("paper", accuracy="balanced") == (0, "row_rms", 4.0)
    accurate = config("accurate", "--accuracy", "accurate", "--rotation", 32)
    assert (accurate["rotation"], accurate["accuracy"]) == (32, "accurate")
    assert held("accurate") == (32, "all", 0.0)
    assert held("accurate", outlier_rule="row_rms") == (32, "row_rms", 4.0)
    with pytest.raises(ValueError, match="that are not rotated, got rotation 32"):
        held("accurate", outlier_rule="absolute")
    assert "--accuracy must be left out for" in refusal(tmp_path / "paper", "--accuracy", "paper")
    assert "rotation must be chosen when" in refusal(tmp_path / "paper", "--rotation", 64)
    assert "has none, got 64" in refusal(tiny_llama, "--format", "bitsandbytes", "--rotation", 64)
