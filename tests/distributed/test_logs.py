import logging

from dist_int8.distributed.logs import RankLogger


def test_a_record_carries_its_rank_and_stage_and_names_them(caplog):
    with caplog.at_level(logging.INFO):
        RankLogger("dist_int8.somewhere", 3).info("%d blocks", 7)
    (record,) = caplog.records
    assert (record.rank, record.stage, record.getMessage()) == (3, 3, "[rank 3] 7 blocks")
    assert record.name == "dist_int8.somewhere"
