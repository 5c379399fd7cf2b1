"""The command line, run as a user does: exit codes, one-line errors, clean stdout."""

import json
import os
import subprocess
import sys

import pytest
import typer

import dist_int8
from dist_int8 import RankError
from dist_int8.cli import app, layout

SMALL = ["--device", "cpu", "--max-tokens", "96", "--threads", "1"]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "dist_int8", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=120,
    )


def error_line(capsys, *arguments):
    """Exit code and the one line on stderr of a command that fails before a model is loaded."""
    code = app.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    return code, captured.err


@pytest.mark.parametrize(
    "command", [[], *([name] for name in typer.main.get_command(app.app).commands)]
)
def test_help_teaches_with_an_example(command, capsys):
    assert app.run([*command, "--help"]) == 0
    assert f"dist-int8 {' '.join(command)}".strip() in capsys.readouterr().out


def test_version(capsys):
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"dist-int8 {dist_int8.__version__}\n"


def test_no_command_shows_the_help(capsys):
    assert app.run([]) == 2
    captured = capsys.readouterr()
    assert "Usage" in captured.out + captured.err and "error" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["generate", "--temperature", "-1"], "--temperature must be at least 0.0, got -1.0"),
        (["generate", "--top-p", "2"], "--top-p must be at most 1.0, got 2.0"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["generate", "--temperature", "warm"], "--temperature must be a number, got 'warm'"),
        (["generate", "--tmperature", "1"], "No such option: --tmperature"),
        (["genrate"], "No such command 'genrate'"),
        (["generate", "--prompt", "x"], "model must be a folder or a hub id, got none"),
        (["generate", "--model", "x"], "prompt must be given, got none"),
        (["generate", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["generate", "--device", "cpu", "--gpus", "2"], "--device cpu must be given alone"),
        (["generate", "--device", "cpu", "--devices", "cpu"], "--device cpu must be given alone"),
        (["generate", "--device", "cpu", "--stages", "0"], "stages must be at least 1, got 0"),
        (["generate", "--devices", "cpu,gpu"], "devices must be cpu or cuda:N, got 'gpu'"),
        (["generate", "--devices", "cpu", "--gpus", "1"], "gpus must be left out when devices"),
        (["generate", "--outlier-rule", "some"], "--outlier-rule must be 'none'"),
        (["generate", "--config", "/no/such.yaml"], "/no/such.yaml: config must be a YAML file"),
        (["launch", "--stages", "2", "no-such-program"], "must be generate, a script or a program"),
        (["launch", "--stages", "2", "no_such.py"], "script must be a file, got 'no_such.py'"),
        (["launch", "--stages", "0", "generate"], "--stages must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, part, capsys):
    code, line = error_line(capsys, *arguments)
    assert code == 2 and part in line


def test_the_layout_of_flags_replaces_that_of_the_file(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("foo: 1\n")
    code, line = error_line(capsys, "generate", "--config", tmp_path / "s.yaml")
    assert code == 2 and "s.yaml:foo: foo must be a known setting" in line
    (tmp_path / "s.yaml").write_text("devices: [cpu, cpu, cpu]\n")
    chosen = layout.choose_layout("generate", tmp_path / "s.yaml", "cpu", {"stages": 2})
    assert chosen == {"stages": None, "gpus": None, "devices": ["cpu", "cpu"]}


@pytest.mark.parametrize(
    ("text", "world_size", "num_stages"),
    [("stages: 3\n", None, 3), ("devices: [cpu, cpu]\n", None, 2), ("", "4", 4), ("", None, 1)],
)
def test_device_cpu_takes_the_number_of_stages_from_file_or_launcher(
    tmp_path, monkeypatch, text, world_size, num_stages
):
    (tmp_path / "s.yaml").write_text(text)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    chosen = layout.choose_layout("generate", tmp_path / "s.yaml", "cpu", {})
    assert chosen["devices"] == ["cpu"] * num_stages


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\nb"), 2, "error: a b\n"),
        (FileNotFoundError("gone"), 2, "error: gone\n"),
        (RuntimeError("rank 1 died"), 1, "error: rank 1 died\n"),
        (OSError("disk full"), 1, "error: disk full\n"),
    ],
)
def test_exit_codes_of_errors(error, code, line, capsys):
    assert app._report(error) == code
    assert capsys.readouterr().err == line


def test_an_assertion_keeps_its_traceback():
    with pytest.raises(AssertionError):
        app._report(AssertionError("ours"))


def test_debug_keeps_the_traceback():
    answer = run("generate", "--temperature", "-1", DIST_INT8_DEBUG="1")
    assert answer.returncode == 1 and "Traceback" in answer.stderr


def test_gpus_on_a_machine_without_any(tiny_llama):
    answer = run("generate", "-m", tiny_llama, "-p", "x", "--gpus", "4", CUDA_VISIBLE_DEVICES="")
    assert answer.returncode == 2 and answer.stdout == ""
    (line,) = answer.stderr.splitlines()
    assert "gpus must be at most the number of GPUs seen, 0 (" in line and "--device cpu" in line


def test_missing_model_folder(tmp_path):
    answer = run("generate", "--model", tmp_path / "none", "--prompt", "x", *SMALL)
    assert answer.returncode == 2 and answer.stdout == ""
    (line,) = answer.stderr.splitlines()
    assert "no such folder" in line


@pytest.fixture(scope="module")
def as_json(tiny_llama):
    """A batch of two prompts as JSON, through two stages."""
    prompts = ["--prompt", "The capital of France is", "--prompt", "Größe"]
    flags = ["--stages", "2", "--max-new-tokens", "8", "--json", *SMALL]
    return run("generate", "--model", tiny_llama, *prompts, *flags)


def test_json_is_one_object_per_prompt_and_nothing_else(as_json):
    assert as_json.returncode == 0, as_json.stderr
    first, second = map(json.loads, as_json.stdout.splitlines())
    assert first["prompt"] == "The capital of France is" and second["prompt"] == "Größe"
    assert len(first["token_ids"]) == 8 and isinstance(first["text"], str)
    assert first["num_stages"] == 2 and first["num_micro_batches"] == 2
    assert first["prefill_tokens_per_s"] > 0 and first["decode_tokens_per_s"] > 0
    stages = first["stages"]
    assert [stage["rank"] for stage in stages] == [0, 1]
    assert all(stage["device"] == "cpu" and stage["bytes"] > 0 for stage in stages)
    assert stages[0]["blocks"][0] == 0 and stages[1]["blocks"][1] == 3
    assert stages[0]["blocks"][1] + 1 == stages[1]["blocks"][0]
    assert as_json.stderr == ""


def test_text_is_streamed_to_stdout_and_the_rest_to_stderr(tiny_llama, as_json):
    flags = ["--prompt", "The capital of France is", "--max-new-tokens", "8", *SMALL]
    expected = json.loads(as_json.stdout.splitlines()[0])["text"]
    streamed = run("generate", "--model", tiny_llama, *flags, "--show-schedule")
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout == expected + "\n"
    for part in ["blocks", "stage 0", "clock", "8 tokens: prefill", "in fp32"]:
        assert part in streamed.stderr
    at_the_end = run("generate", "--model", tiny_llama, *flags, "--no-stream", "--quiet")
    assert at_the_end.stdout == expected + "\n" and at_the_end.stderr == ""
    one_object = run("generate", "--model", tiny_llama, *flags, "--json")
    assert json.loads(one_object.stdout)["text"] == expected


def test_chat_needs_a_chat_template(tiny_llama):
    answer = run("generate", "-m", tiny_llama, "-p", "x", "--chat", "--quiet", *SMALL)
    assert answer.returncode == 2 and "must have a chat template" in answer.stderr


@pytest.mark.parametrize(
    "text, advice",
    [
        ("rank 1 (process 7) died with signal SIGKILL", "; start again, or set `recover"),
        ("rank 1 failed: x must be 1, got 2; change x", "; change x"),
    ],
)
def test_a_lost_rank_comes_with_advice(text, advice, monkeypatch, capsys):
    def lose_it(**_):
        raise RankError(text, 1)

    monkeypatch.setattr(app, "app", lose_it)
    assert app.run(["generate"]) == app.FAILED
    said = capsys.readouterr().err
    assert said.startswith(f"error: {text.partition(';')[0]}") and said.count(";") == 1
    assert advice in said and said.count("\n") == 1
