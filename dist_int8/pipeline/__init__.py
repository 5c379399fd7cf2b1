"""Stages, micro-batches and what moves between them: receive, run the stage's blocks, send."""

from dist_int8.distributed.world import LostRank, RankDied, StageHung

__all__ = ["LostRank", "RankDied", "StageHung"]
