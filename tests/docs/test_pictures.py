"""The picture and the table of the README show the figures that the results record."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURES = runpy.run_path(str(ROOT / "docs" / "pictures.py"))


def read_row(name):
    """Cells of the README's first table in the row that begins with `name`."""
    lines = (ROOT / "README.md").read_text().splitlines()
    row = next(line for line in lines if line.replace("*", "").startswith(f"| {name}"))
    return [cell.strip() for cell in row.replace("*", "").split("|")[2:-1]]


def read_result(name):
    return json.loads((PICTURES["RESULTS"] / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "method"),
    [("dist_int8, a checkpoint", "ours"), ("bitsandbytes 0.50.2", "bitsandbytes")],
)
def test_perplexities_of_the_readme_are_those_recorded(name, method):
    plain, features, *_ = read_row(name)
    as_it_is, *changes = PICTURES["read_runs"](method)
    assert plain == f"{as_it_is:+.2f}%"
    assert features == f"{min(changes):+.2f}% to {max(changes):+.2f}%"


@pytest.mark.parametrize(
    ("name", "key"),
    [("dist_int8, `load()`", "dist_int8"), ("transformers, fp32", "transformers")],
)
def test_speeds_of_the_readme_are_those_recorded(name, key):
    *_, speeds, _ = read_row(name)
    batches = read_result("decode")["batches"].values()
    assert speeds == " / ".join(f"{batch[f'{key}_tokens_per_s']:.0f}" for batch in batches)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dist_int8, a checkpoint", "ours"),
        ("transformers, fp32", "fp32"),
        ("bitsandbytes", "bitsandbytes"),
    ],
)
def test_the_linear_of_the_readme_is_the_one_recorded(name, kind):
    layers = read_result("linear")["layers"]
    layer = next(one for one in layers if (one["N"], one["K"], one["M"]) == (4096, 4096, 1))
    assert float(read_row(name)[-1]) == pytest.approx(layer["milliseconds"][kind], rel=0.01)


def test_the_committed_pictures_are_small():
    for picture in (ROOT / "docs" / "images").glob("*.svg"):
        assert picture.stat().st_size < 100_000, picture


def test_the_picture_is_drawn_from_its_figures(tmp_path):
    """Another figure gives another picture, the same figures the same file."""
    changes = PICTURES["read_changes"]()
    PICTURES["draw"](changes, tmp_path / "a.svg")
    PICTURES["draw"](changes, tmp_path / "b.svg")
    PICTURES["draw"](changes | {"ours": (5.0, 5.0)}, tmp_path / "c.svg")
    a, b, c = ((tmp_path / f"{name}.svg").read_text() for name in "abc")
    assert a == b != c and re.match(r"<\?xml", a)
