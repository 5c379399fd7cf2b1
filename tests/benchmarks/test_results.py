"""Results are summaries: samples become count, median and quartiles, unless --raw asks for them."""

import json

import results


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
