"""Records survive whoever writes them: torn lines, long texts, refusals of what is no record."""

import json

import pytest
import records


def test_records_round_trip(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    written = records.Records(path, "linear")
    written.add("cell", N=3, us=1.5)
    written.add("cell", N=4, us=2.5)
    records.Records(path, "block").add("cell", N=5)
    assert records.read(path)[0] == {"step": "linear", "kind": "cell", "N": 3, "us": 1.5}
    assert [record["N"] for record in written.mine("cell")] == [3, 4]
    assert records.read(tmp_path / "missing.jsonl") == []


def test_records_without_a_file_are_dropped():
    nowhere = records.Records(None, "linear")
    nowhere.add("cell", N=3)
    assert nowhere.mine("cell") == []


def test_records_since_the_start_of_the_step(tmp_path):
    path = tmp_path / "results.jsonl"
    runner, step = records.Records(path, "first_light"), records.Records(path, "linear")
    for number in range(3):
        runner.add("begin", name="linear")
        step.add("error", number=number)
        runner.add("begin", name="block")
    assert [record["number"] for record in step.mine("error", since_begin=True)] == [2]
    assert len(step.mine("error")) == 3


@pytest.mark.parametrize("torn", [b'{"step": "li', b'{"step": "a", "kind": "b"}', b"\xff\xfe"])
def test_a_torn_line_is_left_out_and_then_cut_off(tmp_path, torn):
    path = tmp_path / "results.jsonl"
    one = records.Records(path, "one")
    one.add("a")
    with path.open("ab") as file:
        file.write(torn)
    assert [record["kind"] for record in records.read(path)] == ["a"]
    one.add("b")
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_torn_first_line_is_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"step"')
    assert records.read(path) == []
    records.Records(path, "one").add("a")
    assert len(records.read(path)) == 1


def test_long_texts_keep_their_end(tmp_path):
    path = tmp_path / "results.jsonl"
    records.Records(path, "one").add("failure", message="x" * 10**6 + "the end")
    message = records.read(path)[0]["message"]
    assert len(message) == records.MOST_TEXT and message.endswith("the end")


@pytest.mark.parametrize("line", ["[]", "{}", '{"step": 1, "kind": "a"}', "nothing"])
def test_complete_line_that_is_not_a_record_is_refused(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text(f'{{"step": "a", "kind": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"results.jsonl:2: a line must be a record"):
        records.read(path)
