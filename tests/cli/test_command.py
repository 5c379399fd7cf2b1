"""Command lines as they are mistyped: doubled, empty and wrong values; streams that are closed."""

import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from dist_int8.cli import app
from dist_int8.cli.command import Command

COMMANDS = typer.main.get_command(app.app).commands
ROOT = Path(__file__).parents[2]
PLAN = f"plan -m {ROOT}/configs/models/opt-125m --devices cpu,cpu"


def error_of(capsys, line):
    code = app.run(shlex.split(line))
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("error: "), shown
    assert code == (1 if line.startswith("plan") else 2)
    return shown.err


def shell(line, **environment):
    """Runs a line of bash in which `dist-int8` is this one."""
    text = line.replace("dist-int8", f"{sys.executable} -m dist_int8")
    return subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=300,
    )


def test_every_command_is_one_of_ours():
    assert all(isinstance(command, Command) for command in COMMANDS.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_quiet_or_verbose(name, capsys):
    spellings = {name for param in COMMANDS[name].params for name in param.opts}
    assert {"-q", "--quiet", "-v", "--verbose"} <= spellings
    arguments = {"quantize": " x y", "dequantize": " x y", "verify": " x", "launch": " x"}
    assert "got both; keep one" in error_of(capsys, f"{name} -q -v{arguments.get(name, '')}")


def single_options():
    for name, command in COMMANDS.items():
        for param in command.params:
            flag = max(param.opts, key=len)
            if flag.startswith("--") and not param.is_flag and not param.count:
                yield name, flag, param.multiple, param.name


@pytest.mark.parametrize(("name", "flag", "many", "key"), list(single_options()))
def test_no_option_takes_two_values_or_an_empty_one(name, flag, many, key, capsys):
    if not many:
        assert f"{flag} must be given once, got it 2 times" in error_of(
            capsys, f"{name} {flag} 1 {flag} 2"
        )
    if key not in ("prompt", "system"):
        assert f"{flag} must be non-empty, got ''" in error_of(capsys, f"{name} {flag} ''")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("generate --int8 --no-int8", "--int8/--no-int8 must be given once, got it 2 times"),
        ("quantize M ''", "quantize: OUT must be non-empty, got ''; give a value"),
        ("verify ''", "verify: FOLDER must be non-empty, got ''"),
        ("generate --temperature warm", "--temperature must be a number, got 'warm'"),
        ("generate -n 1e3", "--max-new-tokens must be an integer, got '1e3'"),
        (
            "generate --threads 0",
            "--threads must be at least 1, got 0; write it like `--threads 1`",
        ),
        ("generate --hot-columns 3", "No such option: --hot-columns"),
        ("generate --json=1", "dist-int8 generate: Option '--json' does not take a value"),
        ("launch --drain nan x", "--drain must be at most 86400, got nan"),
        ("launch --stages 99999999999999999999 x", "--stages must be at most 1024, got 9999"),
        ("bench --threads 0", "--threads must be at least 1, got 0"),
        ("bench --threads 1", "--profile must be given with --threads, got none"),
        ("bench --stages 2", "--plot must be given with --stages, got none"),
        ("bench --plot x.png --trace t --stages 2", "--stages must be left out with --trace"),
        ("bench --plot x.gif", "--plot must be a file that can be written, got 'x.gif'"),
        ("bench --plot /no/x.png", "got '/no/x.png' (no folder '/no'); check the path"),
        ("bench --profile /no/x.yaml", "--profile must be a file that can be written"),
        ("bench --plot x.png --trace /no.json", "/no.json: trace must be a file of dist-int8"),
        ("eval -m x --limit 3", "--limit must be left out without --tasks, got '3'"),
        ("eval -m x --text /dev/zero", "--text must be a file or a folder, got the device"),
        ("eval -m x --tasks y --stride 3", "--stride must be left out with --tasks, got '3'"),
        ("eval -m x --plot /no/x.png", "--plot must be a file that can be written"),
        ("generate -m x -p y --trace /no/t.json", "--trace must be a file that can be written"),
        ("quantize a b --shard-size 2", "--shard-size must be a byte size with its unit, got '2'"),
    ],
)
def test_mistakes_are_named_as_they_were_typed(line, part, capsys):
    assert part in error_of(capsys, line)


def test_a_switch_may_be_repeated_and_help_always_helps(capsys):
    assert app.run(shlex.split(f"{PLAN} --json --json")) == 0
    assert app.run(shlex.split("plan --gpus 1 --gpus 2 --config '' --help")) == 0
    assert "Usage" in capsys.readouterr().out


def test_the_home_folder_is_expanded_in_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").symlink_to(ROOT / "configs/models/opt-125m")
    assert app.run(shlex.split("plan --model '~/m' --devices cpu --save '~/plan.yaml'")) == 0
    assert app.run(shlex.split("plan --config '~/plan.yaml' --json")) == 0
    assert (tmp_path / "plan.yaml").exists()


@pytest.mark.parametrize("command", [PLAN, "--help", "--version", "eval --list-methods"])
def test_stdout_that_is_closed_or_full_is_one_line(command):
    closed = shell(f"dist-int8 {command} >&-")
    assert (closed.returncode, closed.stderr.count("\n")) == (1, 1)
    assert closed.stderr.startswith("error: stdout is closed; redirect it")
    full = shell(f"dist-int8 {command} > /dev/full")
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)
    assert full.stderr.startswith("error: stdout: No space left on device; ")


@pytest.mark.parametrize("command", [PLAN, "--help", "eval --list-methods"])
def test_a_reader_that_stops_and_a_closed_stderr_are_no_traceback(command):
    assert shell(f"dist-int8 {command} | head -1").stderr == ""
    alone = shell(f"dist-int8 {command} 2>&- <&-")
    assert alone.returncode == 0 and alone.stdout and alone.stderr == ""


def test_answers_to_a_closed_stdout_or_one_reader(tiny_llama):
    flags = f"-m {tiny_llama} --device cpu --threads 1 --max-tokens 64 -n 4 -q"
    two = "-p 'Hello' -p 'You'"
    closed = shell(f"dist-int8 generate {flags} {two} >&-")
    assert closed.returncode == 1 and closed.stderr.startswith("error: stdout is closed")
    read = shell(f"dist-int8 generate {flags} {two} --json | head -c 1")
    assert read.stdout == "{" and "Traceback" not in read.stderr
    full = shell(f"dist-int8 generate {flags} {two} > /dev/full")
    assert full.returncode == 1 and full.stderr.count("\n") == 1
    assert full.stderr.startswith("error: stdout: No space left on device")


def test_a_disk_that_fills_up_ends_the_run_with_the_name_of_the_file(tiny_llama, tmp_path):
    prompts = "".join(f'{{"prompt": "{i}"}}\n' for i in range(40))
    (tmp_path / "in.jsonl").write_text(prompts)
    command = [sys.executable, "-m", "dist_int8", "generate", "-m", str(tiny_llama), "-q"]
    command += ["--device", "cpu", "--threads", "1", "--max-tokens", "64", "-n", "8"]
    command += ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]

    def limit():  # a write beyond it fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=limit, timeout=300
    )
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith(f"error: {tmp_path}/out.jsonl: File too large; check")


@pytest.mark.parametrize(
    ("output", "part"),
    [("/dev/full", "--output must be an ordinary file"), ("in.jsonl", "another file than --input")],
)
def test_an_output_that_cannot_hold_answers(output, part, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"prompt": "x"}\n')
    line = f"generate -m x --input in.jsonl --output {output}"
    assert part in error_of(capsys, line)
    assert Path("in.jsonl").read_text() == '{"prompt": "x"}\n'
    assert "must be a file or a pipe" in error_of(
        capsys, "generate -m x --input /dev/zero --output y.jsonl"
    )


def test_every_example_of_help_can_be_typed(capsys):
    """Each line of the examples is parsed as the shell would give it; nothing is run."""
    shown = 0
    for name, command in COMMANDS.items():
        lines = [line.strip() for line in command.help.splitlines()]
        for line in lines:
            if not line.startswith(f"dist-int8 {name} "):
                continue
            words = shlex.split(line.split(" | ")[0])[2:]
            with command.make_context(name, words):
                shown += 1
    assert shown > 20
