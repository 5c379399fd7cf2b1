"""What the notes of the stages add up to."""

from dist_int8.pipeline.trace import Trace, chrome, utilisation


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


def test_the_chrome_trace_has_a_slice_a_stage_and_one_a_transfer():
    events = chrome(list(two_micro_batches().records))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {0: "stage 0", 1: "0 -> 1", 2: "stage 1"}
    slices = [(e["name"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert slices == [
        ("P0", 0, 0.0, 10.0),
        ("P0", 1, 10.0, 2.0),
        ("P0", 2, 12.0, 10.0),
        ("D1", 0, 10.0, 10.0),
        ("D1", 1, 20.0, 2.0),
        ("D1", 2, 22.0, 10.0),
    ]
    assert chrome([])["traceEvents"] == []
