"""Pictures of traces: drawn by matplotlib, refused in one line where something is missing."""

import sys

import pytest

from dist_int8.cli import app, bench
from dist_int8.pipeline.trace import Trace

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def trace(tmp_path):
    made = Trace()
    for step in range(6):
        made.submitted(step + 1, "P" if step < 2 else "D", step % 2, 5)
        made.finished([(1000 * step, 1000 * step + 800), (1000 * step + 900, 1000 * step + 1900)])
    made.save(tmp_path / "trace.json")
    return tmp_path / "trace.json"


def test_plot_draws_a_trace(trace, tmp_path, capsys):
    for name, begin in (("a.png", PNG), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        picture = tmp_path / name
        assert app.run(["bench", "--plot", str(picture), "--trace", str(trace)]) == 0
        assert picture.read_bytes().startswith(begin)
    text = (tmp_path / "a.svg").read_text()
    assert text.count("<path") > 12  # a bar a micro-batch and stage at least
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("6 micro-batches in 0.00 s; stage 0 busy 70%, stage 1 busy 87%")


def test_plot_without_a_trace_runs_a_short_generation(tiny_llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "NUM_NEW_TOKENS", 4)
    picture = tmp_path / "run.png"
    command = ["bench", "--plot", picture, "--model", tiny_llama, "--stages", "1"]
    assert app.run([str(argument) for argument in command]) == 0
    assert picture.read_bytes().startswith(PNG) and "stage 0 busy" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "--profile or --plot must be given, got neither"),
        (["--trace", "t.json"], "--plot must be given with --trace, got none"),
        (["--plot", "a.png", "--trace", "t", "--model", "m"], "--model must be left out with"),
        (["--plot", "a.png", "--trace", "/none"], "/none: trace must be a file of"),
    ],
)
def test_incompatible_flags_are_refused(flags, part, capsys):
    assert app.run(["bench", *flags]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"traceEvents": []}',
        b'{"traceEvents": [{"ph": "X"}]}',
        b'{"traceEvents": [{"ph": "X", "tid": 0, "ts": 0, "dur": 1, "name": "main"}]}',
    ],
)
def test_file_that_is_not_a_trace_is_refused(tmp_path, content, capsys):
    (tmp_path / "t.json").write_bytes(content)
    command = ["bench", "--plot", tmp_path / "a.png", "--trace", tmp_path / "t.json"]
    assert app.run([str(argument) for argument in command]) == 2
    assert "trace must be a file of dist-int8 generate --trace" in capsys.readouterr().err


def test_unwritable_picture_is_refused(trace, tmp_path, capsys):
    for name in ("a.xyz", "no/a.png"):
        assert app.run(["bench", "--plot", str(tmp_path / name), "--trace", str(trace)]) == 2
        assert "--plot must be a file that can be written" in capsys.readouterr().err


def test_missing_matplotlib_says_what_to_install(trace, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert app.run(["bench", "--plot", str(tmp_path / "a.png"), "--trace", str(trace)]) == 2
    assert 'pip install "dist_int8[plot]"' in capsys.readouterr().err
