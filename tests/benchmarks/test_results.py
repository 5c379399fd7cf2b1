"""Results are summaries: samples become count, median and quartiles, unless --raw asks for them."""

import ast
import json
from pathlib import Path

import pytest
import results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_samples_become_median_and_quartiles(tmp_path):
    figures = {"ratio": 1.23456789, "cut": [17, 13], "errors": [1.0, 2.0, 3.0, 4.0, 5.0]}
    written = json.loads(results.write_result("x", figures, tmp_path / "x.json").read_text())
    assert written["errors"] == {"samples": 5, "median": 3.0, "quartiles": [2.0, 4.0]}
    assert written["ratio"] == 1.23457 and written["cut"] == [17, 13]
    assert {"command", "device", "commit", "versions"} <= written.keys()


def test_raw_keeps_every_sample(tmp_path):
    figures = {"windows": {"loss": [0.1, 0.2, 0.3]}}
    written = json.loads(
        results.write_result("x", figures, tmp_path / "x.json", raw=True).read_text()
    )
    assert written["windows"] == figures["windows"]


def test_samples_inside_samples_are_summarized_too():
    found = results.summarize({"windows": {"loss": [1, 3], "text": "a"}})
    assert found["windows"]["loss"]["median"] == 2 and found["windows"]["text"] == "a"


def test_json_keeps_short_values_on_one_line():
    value = {"versions": {"torch": "2.13.0"}, "rows": [{"a": i, "b": "x" * 60} for i in range(3)]}
    text = results.format_json(value)
    assert json.loads(text) == value
    assert text.splitlines()[1] == '  "versions": {"torch": "2.13.0"},'


SCRIPTS = sorted({*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("tasks/*.py")})


def test_a_run_leaves_the_committed_results_alone(monkeypatch):
    assert BENCHMARKS not in results.FOLDER.parents  # nothing in build/ is committed
    assert "build/" in (BENCHMARKS.parent / ".gitignore").read_text().splitlines()
    parser = results.make_parser("A question?")
    assert parser.parse_args([]).json is None
    written = []
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.append(path))
    for committed in (BENCHMARKS / "results").glob("*.json"):
        results.write_result(committed.stem, {})
        assert written[-1] == BENCHMARKS.parent / "build" / "benchmarks" / committed.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_script_names_a_committed_folder_to_write_to(script):
    """Of the folders of the tree, they name configs, to read, and build, which git ignores."""
    source = script.read_text()
    for node in ast.walk(ast.parse(source)):
        text = ast.get_source_segment(source, node) or ""
        if isinstance(node, ast.BinOp) and "__file__" in text:
            assert '/ "build"' in text or '/ "configs"' in text, text
        if isinstance(node, ast.Call) and text.startswith("write_result("):
            assert "args.json" in text or "path, raw=True" in text, text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_that_takes_a_model_reads_it(script):
    source = script.read_text()
    if "= make_parser(" in source and "takes_model=False" not in source:
        assert "folder_of(args" in source or "args.model" in source


def test_make_bench_runs_scripts_that_take_json():
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    names = makefile.split("BENCHMARKS :=")[1].split("\n\n")[0].replace("\\", "").split()
    writing = {path.stem for path in SCRIPTS if "    write_result(" in path.read_text()}
    # peers needs other engines installed, launches a library with CUDA kernels, host_time another
    # checkout
    assert set(names) == writing - {"results", "peers", "launches", "host_time"}
