"""The simulator against the formulas of a pipeline in steady state."""

import pytest

from dist_int8.pipeline.simulator import simulate


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("num_lanes", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("hop", [0.0, 0.5, 2.0])
def test_equal_stages_follow_the_formula(num_stages, num_lanes, hop):
    """A round of m lanes takes max(m t, P (t + h)) with t = 4."""
    result = simulate([4.0] * num_stages, num_lanes, hop_s=hop)
    hop = hop if num_stages > 1 else 0.0
    round_s = max(num_lanes * 4.0, num_stages * (4.0 + hop))
    assert result.micro_batches_per_s == pytest.approx(num_lanes / round_s, rel=1e-6)
    assert result.utilisation == pytest.approx([4.0 * num_lanes / round_s] * num_stages)


def test_the_slowest_stage_bounds_what_lanes_can_hide():
    stages = [3.0, 5.0, 2.0]
    assert simulate(stages, 1, hop_s=1.0).micro_batches_per_s == pytest.approx(1 / 13)
    full = simulate(stages, 4, hop_s=1.0)
    assert full.micro_batches_per_s == pytest.approx(1 / 5)
    assert full.utilisation == pytest.approx((3 / 5, 1.0, 2 / 5))
    assert full.latency_s >= 13.0


def test_work_beside_stage_0_counts_there():
    assert simulate([4.0, 4.0], 3, host_s=1.0).micro_batches_per_s == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1), "got 0, 1 and 64"),
        (([1.0], 0), "got 1, 0 and 64"),
        (([1.0, -1.0], 1), "must not be negative"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(*arguments)
