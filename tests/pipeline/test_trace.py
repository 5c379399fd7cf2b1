"""What the notes of the stages add up to."""

import json

import pytest

from dist_int8.pipeline.trace import Trace, chrome, steady, utilisation


def two_micro_batches() -> Trace:
    """stage 0 works 0-10 and 10-20, stage 1 12-22 and 22-32 (microseconds)."""
    trace = Trace()
    trace.submitted(1, "P", 0, 64)
    trace.submitted(2, "D", 1, 4)
    trace.finished([(0, 10_000), (12_000, 22_000)])
    trace.finished([(10_000, 20_000), (22_000, 32_000)])
    return trace


def test_records_follow_the_order_of_submission():
    trace = two_micro_batches()
    assert [(r.step, r.kind, r.lane, r.num_tokens) for r in trace.records] == [
        (1, "P", 0, 64),
        (2, "D", 1, 4),
    ]
    assert [record.step for record in trace.since(1)] == [2]


def test_utilisation_is_work_over_the_whole_time():
    assert utilisation(list(two_micro_batches().records)) == [20 / 32, 20 / 32]
    assert utilisation([]) == []


def test_utilisation_of_a_window_counts_what_lies_in_it():
    records = list(two_micro_batches().records)
    assert utilisation(records, 5_000, 17_000) == [12 / 12, 5 / 12]
    assert utilisation(records, 22_000, 32_000) == [0.0, 1.0]
    assert two_micro_batches().utilisation() == utilisation(records)


def test_the_steady_time_is_the_longest_of_decoding_alone():
    trace = Trace()
    for step, kind in enumerate("PDDPDDDP"):
        trace.submitted(step, kind, 0, 1)
        trace.finished([(10 * step, 10 * step + 8), (10 * step + 9, 10 * step + 18)])
    records, begin, end = steady(list(trace.records))
    assert [record.step for record in records] == [4, 5, 6]
    assert (begin, end) == (49, 68)
    assert utilisation(records, begin, end) == [pytest.approx(16 / 19), pytest.approx(18 / 19)]
    assert steady(list(trace.records)[:1]) == ([], 0, 0) and utilisation(*steady([])) == []


def test_the_chrome_trace_has_one_slice_per_stage_and_one_arrow_per_transfer(tmp_path):
    trace = two_micro_batches()
    trace.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert events == chrome(list(trace.records))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {0: "stage 0", 1: "stage 1"}
    slices = [(e["name"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert slices == [
        ("P0", 0, 0.0, 10.0),
        ("P0", 1, 12.0, 10.0),
        ("D1", 0, 10.0, 10.0),
        ("D1", 1, 22.0, 10.0),
    ]
    details = [e["args"] for e in events if e["ph"] == "X" and e["name"] == "D1"]
    assert details == [{"step": 2, "lane": 1, "tokens": 4}] * 2
    transfers = [(e["ph"], e["id"], e["tid"], e["ts"]) for e in events if "id" in e]
    assert transfers[:4] == [
        ("b", "1.0", 0, 10.0),
        ("e", "1.0", 0, 12.0),
        ("s", "1.0", 0, 0.0),
        ("f", "1.0", 1, 12.0),
    ]
    assert chrome([])["traceEvents"] == []
