"""The tables of the documents say what the records say, and nothing else."""

import shutil

import pytest
import records
import report

CARD = "NVIDIA H100 80GB HBM3, 580.1, 81559 MiB"


def add_run(path, card=CARD, device="cuda", small=False):
    records.Records(path, "first_light").add(
        "run",
        time="2026-12-01T10:00:00",
        commit="abcdef1234",
        card=card,
        device=device,
        small=small,
        clean=False,
    )


def add_figures(path, ms=12.5):
    """A record of every kind that a table reads, as the steps write them."""
    runner = records.Records(path, "first_light")
    for name, status in (("card", "passed"), ("test_rows", "timed out"), ("counters", "skipped")):
        runner.add("begin", name=name)
        if name == "test_rows":  # restarted after a test that hung
            tests = records.Records(path, "test_rows")
            tests.add("tests", passed=7, failed=1, skipped=2, seconds=3.5)
            tests.add("tests", passed=2, failed=1, skipped=0, seconds=1.5)
        runner.add("end", name=name, status=status, seconds=3.0, last_line="last")
    model = records.Records(path, "model")
    for engine, factor in (("ours", 1), ("transformers", 3)):
        cell = {"engine": engine, "batch": 8, "context": 128, "tokens_per_s": 640.0}
        model.add("decode", ms=factor * ms, floor_ms=2.75, **cell)
    records.Records(path, "stages").add(
        "layout", name="two threads", batch=8, ms=13.0, tokens_per_s=615, claim="must", equal=True
    )
    held = {"peak": 3.1e9, "weights_planned": 2.5e9, "cache_planned": 0.5e9}
    us = {"graph_us": 700.0, "eager_us": 900.0, "floor_us": 600.0, "times_floor": 1.17}
    records.Records(path, "block").add("decode", batch=1, context=128, bytes=held, **us)
    records.Records(path, "linear").add(
        "cell",
        **{"model": "llama-8b", "N": 28672, "K": 4096, "M": 32, "outliers": "few"},
        times_us={"bf16": 90.0, "none": 50.0, report.DEFAULT: 60.0},
        **{"times_bf16": 1.5, "none_times_bf16": 1.8, "times_bitsandbytes": 6.25},
        **{"of_copy": 0.66, "of_int8": 0.1},
    )
    counters = {"ns": 61_000.0, "of_bandwidth_pct": 71.0, "of_tensor_pipe_pct": None}
    kernel = {"kernel": "int8_matmul_small", "call": "decode", "launch": 0}
    records.Records(path, "counters").add("kernel", **kernel, **counters)
    speeds = {
        "int8_bandwidth": 2.9e12,
        "float_bandwidth": 3e12,
        "int8_ops": 9e14,
        "float_ops": 6e14,
        "attention_ops": 3e14,
        "launch_s": 2e-5,
    }
    records.Records(path, "device_profile").add("profile", measured=speeds, datasheet=speeds)


@pytest.fixture
def tree(tmp_path):
    """A copy of the documents that say that nothing ran, and the empty folder for records."""
    for name in report.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(records.ROOT / name, tmp_path / name)
    (tmp_path / report.RESULTS).mkdir(parents=True)
    assert report.main(["--root", str(tmp_path), "--write"]) == 0
    return tmp_path


def check(tree, *flags):
    return report.main(["--root", str(tree), *flags])


def test_documents_agree_with_the_committed_records(capsys):
    assert report.main([]) == 0, capsys.readouterr().out


def test_figures_come_from_records(tree):
    add_run(tree / report.RESULTS / "h100.jsonl")
    add_figures(tree / report.RESULTS / "h100.jsonl")
    assert check(tree) == 1  # the documents have nothing of them yet
    assert check(tree, "--write") == 0 and check(tree) == 0
    text = "".join((tree / name).read_text() for name in report.DOCUMENTS)
    assert report.NONE not in text and "Nothing here has run on a GPU" not in text
    for line in (
        "| NVIDIA H100 80GB HBM3 | decode | 8 | 128 | 12.50 | 37.50 | 3.00 | 640 | 2.75 |",
        "| NVIDIA H100 80GB HBM3 | two threads | 8 | 13.00 | 615 | yes |",
        "| NVIDIA H100 80GB HBM3 | 1 | 128 | 700 | 900 | 600 | 1.17 | 3.10 | 3.00 |",
        "| NVIDIA H100 80GB HBM3 | decode | `int8_matmul_small` | 61.0 | 71% |  |  |  |",
        "| NVIDIA H100 80GB HBM3 | test_rows | timed out | 9 | 2 | 2 | 5 |",
        "| NVIDIA H100 80GB HBM3 | int8_bandwidth | 2900 | 2900 | 1.00 |",
    ):
        assert line in text.splitlines()
    assert (
        "28672 x 4096 | 32 | few | 90.0 | 50.0 | 60.0 | 1.50 | 1.80 | 6.2 | 0.66 | 0.10 |" in text
    )
    assert "2 of 3 steps of first light passed; not: test_rows (timed out)." in text


def test_figure_without_a_record_fails(tree, capsys):
    path = tree / "benchmarks" / "README.md"
    claim = (
        "| H900 | 28672 x 4096 | 1 | few | 90.0 | 50.0 | 1.0 | 90.00 | 1.80 | 6.2 | 0.66 | 0.1 |"
    )
    text = path.read_text()
    path.write_text(text.replace("<!-- /gpu:linear -->", f"{claim}\n<!-- /gpu:linear -->"))
    assert check(tree) == 1
    assert f"no record says: {claim}" in capsys.readouterr().out


def test_a_changed_figure_fails(tree):
    add_run(tree / report.RESULTS / "h100.jsonl")
    add_figures(tree / report.RESULTS / "h100.jsonl")
    check(tree, "--write")
    path = tree / "benchmarks" / "README.md"
    path.write_text(path.read_text().replace("| 12.50 | 37.50 |", "| 11.50 | 37.50 |"))
    assert check(tree) == 1


def test_a_table_without_its_end_fails(tree, capsys):
    path = tree / "benchmarks" / "README.md"
    path.write_text(path.read_text().replace("<!-- /gpu:block -->", ""))
    assert check(tree) == 1 and "must have its end" in capsys.readouterr().out


def test_a_damaged_file_of_records_is_named(tree, capsys):
    (tree / report.RESULTS / "h100.jsonl").write_text("nothing\n")
    assert check(tree) == 1 and "h100.jsonl:1: a line must be a record" in capsys.readouterr().out


def test_gpu_without_nvidia_smi_has_the_name_from_torch(tree):
    path = tree / report.RESULTS / "h100.jsonl"
    add_run(path, card=None)
    records.Records(path, "card").add("environment", device="NVIDIA H100 PCIe")
    add_figures(path)
    assert "| NVIDIA H100 PCIe | 8 |" in report.model(report.Figures([path])).replace(
        "decode | ", ""
    )


def test_a_document_without_a_table_fails(tree, capsys):
    path = tree / "benchmarks" / "README.md"
    path.write_text(path.read_text().replace("<!-- gpu:block -->", ""))
    assert check(tree) == 1 and "gpu:block stands in no document" in capsys.readouterr().out


@pytest.mark.parametrize("run", [{"device": "cpu"}, {"small": True}])
def test_rehearsal_records_are_not_reported(tree, run):
    add_run(tree / report.RESULTS / "rehearsal.jsonl", **run)
    add_figures(tree / report.RESULTS / "rehearsal.jsonl")
    assert check(tree) == 0  # the documents still say that nothing ran


def test_the_latest_record_of_each_card_wins(tree):
    for name, card, ms in (("a", CARD, 20.0), ("b", CARD, 10.0), ("c", "NVIDIA H200, 1", 8.0)):
        add_run(tree / report.RESULTS / f"{name}.jsonl", card)
        add_figures(tree / report.RESULTS / f"{name}.jsonl", ms)
    rows = report.model(report.Figures((tree / report.RESULTS).glob("*.jsonl"))).splitlines()[2:]
    assert [(row.split(" | ")[0], row.split(" | ")[4]) for row in rows] == [
        ("| NVIDIA H100 80GB HBM3", "10.00"),
        ("| NVIDIA H200", "8.00"),
    ]
