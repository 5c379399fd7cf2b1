"""The schedule asserted as a picture."""

import pytest

from dist_int8.pipeline import schedule


def picture(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def test_two_stages_two_micro_batches_keep_both_stages_busy():
    drawn = schedule.draw(schedule.build(2, 2, num_prefill_chunks=1, num_decode_steps=2))
    assert picture(drawn) == picture(
        """
        clock       0    1    2    3    4    5    6
        stage 0   0P0  0P1  0D0  0D1  0D0  0D1
        stage 1        1P0  1P1  1D0  1D1  1D0  1D1
        """
    )


def test_one_micro_batch_leaves_every_other_stage_idle():
    drawn = schedule.draw(schedule.build(3, 1, num_prefill_chunks=1, num_decode_steps=1))
    assert picture(drawn) == picture(
        """
        clock       0    1    2    3    4    5
        stage 0   0P0            0D0
        stage 1        1P0            1D0
        stage 2             2P0            2D0
        """
    )


def test_prefill_chunks_of_one_prompt_stream_through_the_stages():
    drawn = schedule.draw(schedule.build(3, 1, num_prefill_chunks=3, num_decode_steps=0))
    assert picture(drawn) == picture(
        """
        clock       0    1    2    3    4
        stage 0   0P0  0P0  0P0
        stage 1        1P0  1P0  1P0
        stage 2             2P0  2P0  2P0
        """
    )


def test_steady_decode_has_no_bubble_with_as_many_micro_batches_as_stages():
    for num_stages in (1, 2, 3, 4):
        grid = schedule.build(num_stages, num_stages, num_decode_steps=20)
        steady = grid[num_stages : len(grid) - num_stages]
        assert all(action is not None for row in steady for action in row)


def test_one_micro_batch_uses_one_stage_at_a_time():
    grid = schedule.build(4, 1, num_decode_steps=10)
    assert all(sum(action is not None for action in row) == 1 for row in grid)
    assert schedule.utilisation(grid) == [0.25] * 4


def test_every_micro_batch_visits_every_stage_in_order_once_per_step():
    grid = schedule.build(3, 4, num_prefill_chunks=2, num_decode_steps=3)
    for micro_batch in range(4):
        for stage in range(3):
            kinds = [
                row[stage].kind
                for row in grid
                if row[stage] and row[stage].micro_batch == micro_batch
            ]
            assert kinds == ["P", "P", "D", "D", "D"]


def test_bad_counts_are_refused_by_name():
    with pytest.raises(ValueError, match="num_stages must be at least 1, got 0"):
        schedule.build(0, 1)


def test_prefill_is_cut_so_that_every_stage_is_busy_most_of_the_time():
    assert schedule.prefill_chunk(4096, 1, 64, 512) == 512  # one stage: nothing to overlap
    assert schedule.prefill_chunk(512, 2, 64, 512) == 64  # 8 chunks: busy 8 of 9 clocks
    assert schedule.prefill_chunk(100, 2, 64, 512) == 64  # never below what a chunk costs anyway
    assert schedule.prefill_chunk(100_000, 4, 256, 512) == 512
    assert schedule.prefill_chunk(10, 4, 256, 32) == 32  # the setting is the largest
    for num_stages in (2, 3, 4, 8):
        chunk = schedule.prefill_chunk(10_000, num_stages, 1, 10_000)
        num_chunks = -(-10_000 // chunk)
        grid = schedule.build(num_stages, 1, num_chunks, 0)
        assert min(schedule.utilisation(grid)) >= 0.8
