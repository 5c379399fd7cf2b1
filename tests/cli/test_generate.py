"""Files of prompts on the command line: kills, bad lines, contradicting flags."""

import io
import json
import signal
import subprocess
import sys
import time

import pytest

import dist_int8
from dist_int8.cli import app

PROMPTS = [{"prompt": f"Number {i}", "id": f"n{i}", "max_new_tokens": 20 + 8 * i} for i in range(8)]
PROMPTS[3] |= {"temperature": 0.9, "seed": 5}
PROMPTS[5] = {"token_ids": [5, 6, 7], "id": "n5", "max_new_tokens": 60}
FLAGS = ["--device", "cpu", "--max-tokens", "160", "--threads", "1", "--max-sequences", "2"]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return {line["id"]: line for line in map(json.loads, path.read_text().splitlines())}


def run(*arguments):
    """Exit code of `generate` in this process."""
    return app.run(["generate", *map(str, arguments)])


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """Token ids of every prompt alone."""
    load = {"devices": ["cpu"], "max_tokens": 160, "threads_per_stage": 1, "progress": False}
    with dist_int8.load(tiny_llama, **load) as model:
        answers = {}
        for index, line in enumerate(PROMPTS):
            settings = {k: v for k, v in line.items() if k not in ("id", "prompt", "token_ids")}
            settings["seed"] = settings.get("seed", 0) + index  # as in a list of prompts
            prompt = line.get("prompt") or line["token_ids"]
            answers[line["id"]] = model.generate(prompt, **settings)[0].token_ids
        return answers


def test_a_killed_run_is_continued(tmp_path, tiny_llama, expected, capfd):
    files = ["--input", write(tmp_path / "in.jsonl", PROMPTS), "--output", tmp_path / "out.jsonl"]
    command = [sys.executable, "-m", "dist_int8", "generate", "-m", tiny_llama, *FLAGS, *files]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    path = tmp_path / "out.jsonl"
    while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n")):
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = path.read_bytes()
    num_before = before.count(b"\n")
    assert 1 <= num_before <= 8
    path.write_bytes(before + b'{"id": "n7", "te')  # as if the kill had torn a line
    trace = tmp_path / "trace.json"
    assert run("-m", tiny_llama, "--stages", "2", *FLAGS, *files, "--trace", trace) == 0
    assert path.read_bytes().startswith(before)
    assert {name: line["token_ids"] for name, line in read(path).items()} == expected
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"8 prompts ({num_before} before)" in last and " tokens/s; stage 0 busy " in last
    tracks = {e["tid"] for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"}
    assert tracks == ({0, 1} if num_before < 8 else set())


def test_bad_lines_get_errors_and_the_others_answers(tmp_path, tiny_llama, expected, capfd):
    lines = [*PROMPTS[:2], {"prompt": "x", "temperature": -1}, {"prompt": "y" * 400}]
    lines += [{"messages": [{"role": "user", "content": "x"}]}, {"token_ids": [288]}]
    output = tmp_path / "out.jsonl"
    files = ["--input", write(tmp_path / "in.jsonl", lines), "--output", output]
    assert run("-m", tiny_llama, *FLAGS, *files, "--json") == 1
    captured = capfd.readouterr()
    figures = json.loads(captured.out)
    assert figures["requests"] == 6 and figures["errors"] == 4
    assert figures["tokens"] == len(expected["n0"]) + len(expected["n1"])
    assert figures["tokens_per_s"] > 0 and len(figures["utilisation"]) == 1
    assert all(0 < share <= 1 for share in figures["utilisation"])
    assert captured.err.startswith("4 of 6 lines could not be answered; see `error` in")
    answers = read(output)
    assert {name: answers[name]["token_ids"] for name in ("n0", "n1")} == {
        name: expected[name] for name in ("n0", "n1")
    }
    parts = {3: "temperature must be at least 0", 4: "must be at most 159 tokens long"}
    parts |= {5: "must have a chat template", 6: "must be integers 0 to 287, got 288"}
    for number, part in parts.items():
        assert part in answers[number]["error"] and "text" not in answers[number]


def test_other_settings_and_a_finished_file(tmp_path, tiny_llama, capfd):
    files = ["--input", write(tmp_path / "in.jsonl", PROMPTS[:2]), "--output", tmp_path / "o.jsonl"]
    flags = ["-m", tiny_llama, *FLAGS, *files, "--quiet"]
    codes = [run(*flags), run(*flags), run(*flags, "--outlier-rule", "none")]
    assert codes == [0, 0, 2]
    done, refused = capfd.readouterr().err.splitlines()[-2:]
    assert done.endswith("has 2 answers already, one per line")
    assert "o.jsonl:1: output must hold answers to this input with these settings" in refused


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--input", "x"], "--input and --output must be given together, got one; add --output"),
        (["--output", "x", "-p", "y"], "got one; add --input"),
        (["--input", "x", "--output", "y", "-p", "z"], "--prompt must be left out with --input"),
        (["--input", "x", "--output", "y", "--show-schedule"], "--show-schedule must be left out"),
        (["--input", "x", "--output", "-"], "--output must be a file, which a later run can"),
        (["--input", "/none", "--output", "y"], "/none: input must be a file of JSON lines"),
    ],
)
def test_contradicting_flags_are_refused(flags, part, capsys):
    assert app.run(["generate", "-m", "x", *flags]) == 2
    assert part in capsys.readouterr().err


def test_a_trace_of_prompts(tmp_path, tiny_llama):
    trace = tmp_path / "trace.json"
    flags = ["-p", "Hello", "-p", "You", "-n", "4", "--json", "--trace", trace]
    assert run("-m", tiny_llama, *FLAGS, *flags) == 0
    names = {e["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"}
    assert names == {"P0", "D0"}


FEW = ["--device", "cpu", "--max-tokens", "64", "--threads", "1", "-n", "3", "--quiet"]


@pytest.fixture
def no_weights(tiny_llama, tmp_path):
    """A copy of the model whose weights cannot be read."""
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    size = int.from_bytes(content[:8], "little")
    weights.write_bytes(content[: 8 + size] + b"\xff" * (len(content) - 8 - size))  # all NaN
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["-p", ""], "prompt 0 must have at least one token"),
        (["-p", "a" * 64], "prompt 0 must be at most 63 tokens long (the context is 64), got 64"),
        (["-p", "a", "-p", ""], "prompt 1 must have at least one token"),
        (["-p", "a", "--chat"], "must have a chat template"),
        (["-p", "a", "--system", "Be brief."], "must have a chat template"),
        (["-p", "a", "--stop-token-id", "999"], "stop_token_ids must be token ids below 288"),
        (["-p", "a", "--min-new-tokens", "9"], "min-new-tokens must be at most max_new_tokens (3)"),
    ],
)
@pytest.mark.parametrize("stages", [[], ["--stages", "2"]])
def test_bad_prompts_are_refused_before_weights_are_read(
    no_weights, flags, part, stages, monkeypatch, capfd
):
    def read(*_):
        raise AssertionError("weights were read, or ranks started")

    monkeypatch.setattr("dist_int8.api.start.build_stage", read)
    monkeypatch.setattr("dist_int8.api.start._join_ranks", read)
    assert run("-m", no_weights, *FEW, *flags, *stages) == 2
    out, err = capfd.readouterr()
    assert part in err and out == "" and err.count("\n") == 1


def test_lines_that_all_fail_cost_no_weights(no_weights, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("dist_int8.api.start.build_stage", lambda *_: pytest.fail("weights"))
    lines = [{"prompt": ""}, {"token_ids": [288]}, {"prompt": "a", "temperature": -1}]
    lines += [{"messages": [{"role": "user", "content": "a"}]}]
    output = tmp_path / "out.jsonl"
    files = ["--input", write(tmp_path / "in.jsonl", lines), "--output", output]
    assert run("-m", no_weights, *FEW, *files) == 1
    errors = [line["error"] for line in read(output).values()]
    assert len(errors) == 4 and "at least one token" in errors[0] and "chat template" in errors[3]


def give_stdin(monkeypatch, content, is_terminal=False):
    class Stdin(io.TextIOWrapper):
        def isatty(self):
            return is_terminal

    monkeypatch.setattr("sys.stdin", Stdin(io.BytesIO(content)))


def test_a_prompt_and_lines_come_from_stdin(tiny_llama, tmp_path, monkeypatch, capfd):
    run("-m", tiny_llama, *FEW, "-p", "Größe\nb", "--json")
    expected = capfd.readouterr().out
    give_stdin(monkeypatch, "\ufeffGröße\nb\r\n".encode())
    run("-m", tiny_llama, *FEW, "-p", "-", "--json")
    got = capfd.readouterr().out
    for key in ("prompt", "token_ids"):
        assert json.loads(got)[key] == json.loads(expected)[key]
    give_stdin(monkeypatch, b'{"prompt": "a"}\n\n{"token_ids": [5]}\n')
    output = tmp_path / "out.jsonl"
    assert run("-m", tiny_llama, *FEW, "--input", "-", "--output", output) == 0
    assert set(read(output)) == {1, 3}


@pytest.mark.parametrize(
    ("content", "is_terminal", "flags", "part"),
    [
        (b"", False, ["-p", "-"], "--prompt - must have something to read on stdin, got nothing"),
        (b" \n", False, ["-p", "-"], "got nothing"),
        (b"a", True, ["-p", "-"], "got a terminal"),
        (b"a\xff", False, ["-p", "-"], "a byte of another encoding at position 2"),
        (b"a", False, ["-p", "-", "-p", "-"], "--prompt - must be given once, got it 2 times"),
        (b"", False, ["--input", "-", "--output", "o"], "--input - must have something to read"),
        (b"a", True, ["--input", "-", "--output", "o"], "got a terminal"),
    ],
)
def test_a_stdin_that_has_no_prompt_is_refused(
    content, is_terminal, flags, part, monkeypatch, capfd, tmp_path
):
    monkeypatch.chdir(tmp_path)
    give_stdin(monkeypatch, content, is_terminal)
    assert app.run(["generate", "-m", "x", *flags]) == 2
    assert part in capfd.readouterr().err


def test_chats_of_the_command_line(tiny_llama, tmp_path, capfd):
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    answers = []
    for flags in (
        ["-p", "Hi", "--chat"],
        ["-p", "Hi", "--system", "Go."],
        ["-p", "user:Hi;"],
        ["-p", "system:Go.;user:Hi;"],
    ):
        assert run("-m", tmp_path, *FEW, "--json", *flags) == 0
        answers.append(json.loads(capfd.readouterr().out)["token_ids"])
    assert answers[:2] == answers[2:] and answers[0] != answers[1]


def test_the_models_defaults_are_shown_and_left_out(tiny_llama, tmp_path, capfd):
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = {"do_sample": True, "temperature": 0.6, "top_k": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    flags = ["-m", tmp_path, "-p", "a", *FEW[:-1], "--top-k", "3"]
    assert run(*flags) == run(*flags, "--no-model-defaults") == 0
    said = "from the model's generation_config.json: do_sample=True, temperature=0.6\n"
    assert capfd.readouterr().err.count(said) == 1
