"""The simulator against the formulas of a pipeline in steady state."""

from pathlib import Path

import pytest

from dist_int8.pipeline import schedule
from dist_int8.profiling.simulator import draw, simulate


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("num_lanes", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("hop", [0.0, 0.5, 2.0])
def test_equal_stages_follow_the_formula(num_stages, num_lanes, hop):
    """A round of m lanes takes max(m t, P (t + h)) with t = 4."""
    result = simulate([[4.0] * num_stages] * num_lanes, hop_s=hop)
    hop = hop if num_stages > 1 else 0.0
    round_s = max(num_lanes * 4.0, num_stages * (4.0 + hop))
    assert result.micro_batches_per_s == pytest.approx(num_lanes / round_s, rel=1e-6)
    assert result.utilisation == pytest.approx([4.0 * num_lanes / round_s] * num_stages)


def test_the_slowest_stage_bounds_what_lanes_can_hide():
    stages = [3.0, 5.0, 2.0]
    one = simulate([stages], hop_s=1.0)
    assert one.micro_batches_per_s == pytest.approx(1 / 13) and one.latency_s == pytest.approx(13)
    full = simulate([stages] * 4, hop_s=1.0)
    assert full.micro_batches_per_s == pytest.approx(1 / 5)
    assert full.utilisation == pytest.approx((3 / 5, 1.0, 2 / 5))
    assert full.latency_s >= 13.0


def test_lanes_of_different_sizes_alternate():
    """A round of two lanes is the longer lane's 4 + 5; of three lanes, stage 1's 5 + 3 + 3."""
    result = simulate([[4.0, 5.0], [2.0, 3.0]])
    assert result.micro_batches_per_s == pytest.approx(2 / 9)
    three = simulate([[4.0, 5.0], [2.0, 3.0], [2.0, 3.0]])
    assert three.micro_batches_per_s == pytest.approx(3 / 11)
    assert three.utilisation == pytest.approx((8 / 11, 1.0))


def test_host_time_adds_to_stage_0():
    result = simulate([[4.0, 4.0]] * 3, host_s=1.0)
    assert result.micro_batches_per_s == pytest.approx(1 / 5)
    assert result.utilisation == pytest.approx((1.0, 4 / 5))


def test_stages_that_share_cores_slow_each_other():
    """Three busy stages on two cores: 12 seconds of work per micro-batch, two done per second."""
    result = simulate([[4.0] * 3] * 4, speeds=(1, 1, 2 / 3))
    assert result.micro_batches_per_s == pytest.approx(1 / 6)
    assert result.utilisation == pytest.approx((1, 1, 1))
    alone = simulate([[4.0] * 3], speeds=(1, 1, 2 / 3))  # one at a time shares nothing
    assert alone.micro_batches_per_s == pytest.approx(1 / 12)
    crowded = simulate([[4.0, 4.0]] * 3, speeds=(1, 0.8))
    assert crowded.micro_batches_per_s == pytest.approx(0.8 / 4)


def test_hop_takes_longer_while_other_stages_work():
    """One lane hops in 1 while no stage works; with three lanes others work, and a hop takes 5."""
    assert simulate([[4.0, 4.0]], hop_s=(1.0, 5.0)).latency_s == pytest.approx(10)
    three = simulate([[4.0, 4.0]] * 3, hop_s=(1.0, 5.0))
    assert three.micro_batches_per_s == pytest.approx(3 / 18)  # 2 (4 + 5)
    assert simulate([[4.0, 4.0]] * 3, hop_s=(1.0, 1.0)).micro_batches_per_s == pytest.approx(1 / 4)


def test_a_stage_turns_around_between_micro_batches():
    """A full pipeline takes 4 + 1 per micro-batch on stage 0 and 4 + 2 on stage 1."""
    full = simulate([[4.0, 4.0]] * 4, turnaround_s=(1.0, 2.0))
    assert full.micro_batches_per_s == pytest.approx(1 / 6)
    assert full.utilisation[1] == pytest.approx(4 / 6)
    assert simulate([[4.0, 4.0]] * 4, turnaround_s=1.0).micro_batches_per_s == pytest.approx(1 / 5)
    alone = simulate([[4.0, 4.0]], hop_s=1.0, turnaround_s=2.0)
    assert alone.micro_batches_per_s == pytest.approx(1 / 10)
    shared = simulate([[4.0, 4.0]] * 4, speeds=(1, 0.5), turnaround_s=1.0)  # two stages, one core
    assert shared.micro_batches_per_s == pytest.approx(1 / 10)
    with pytest.raises(ValueError, match="turnaround_s must be one time, or one for each of 2"):
        simulate([[4.0, 4.0]], turnaround_s=(1.0, 1.0, 1.0))


def test_the_simulated_order_is_the_schedule():
    """With equal stages and no hop, one clock of the schedule is one unit of time."""
    for num_stages, num_lanes in ((2, 2), (3, 1), (3, 3), (4, 6)):
        grid = schedule.build(num_stages, num_lanes, num_decode_steps=5)
        expected = {
            (clock, action.stage, action.micro_batch)
            for clock, row in enumerate(grid[: 4 * num_lanes])
            for action in row
            if action
        }
        found = {
            (round(one.start), one.stage, one.lane)
            for one in simulate([[1.0] * num_stages] * num_lanes).slices
            if one.start < 4 * num_lanes
        }
        assert expected == found


def test_draw_matches_the_module_docstring():
    simulation = simulate([[4.0, 5.0]] * 3, hop_s=1.0)
    assert draw(simulation, 0.0, 30.0, width=30).splitlines() == [
        "stage 0  00001111222200001111.2222.0000",
        "stage 1  .....0000011111222220000011111",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "got 0, 0 and 32"),
        (([[]],), "got 1, 0 and 32"),
        (([[1.0]], 0.0, 0.0, (1.0,), 3), "got 1, 1 and 3"),
        (([[1.0, -1.0]],), "must not be negative"),
        (([[1.0], [1.0, 2.0]],), r"must have the same stages, got \[1, 2\]"),
        (([[1.0]], 0.0, 0.0, ()), "speeds must be above 0"),
        (([[1.0]], 0.0, 0.0, (1.0, 0.0)), "speeds must be above 0"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(*arguments)


def test_documentation_shows_simulated_pictures_and_figures():
    text = (Path(__file__).parents[2] / "docs" / "pipelining.md").read_text()

    def of(num_lanes, hop):  # 4 ms to read the weights, 0.5 ms per row, 16 sequences
        time = 4 + 0.5 * 16 / num_lanes
        simulation = simulate([[time, time]] * num_lanes, hop_s=hop)
        return simulation, f"{simulation.micro_batches_per_s * 16 / num_lanes:.2f}"

    pictures = [draw(of(num_lanes, 1.0)[0], 60, 120, width=60) for num_lanes in (1, 2, 3)]
    pictures += [draw(simulate([[8, 8]] * m, hop_s=1), 0, 60, width=60) for m in (1, 2)]
    pictures.append(draw(simulate([[6, 10]] * 3, hop_s=1), 0, 60, width=60))
    pictures.append(draw(simulate([[6, 6, 6]] * 3, speeds=(1, 1, 2 / 3)), 0, 60, width=60))
    for picture in pictures:
        assert "\n".join("    " + line for line in picture.splitlines()) in text, picture
    assert [of(num_lanes, 1.0)[1] for num_lanes in (1, 2, 3)] == ["0.62", "0.89", "0.80"]
    slow = [of(num_lanes, 20.0) for num_lanes in (1, 2, 3, 4, 6, 8)]
    assert f"| tokens per ms | {' | '.join(rate for _, rate in slow)} |" in text
    assert f"| stages busy | {' | '.join(f'{s.utilisation[0]:.0%}' for s, _ in slow)} |" in text
