"""Stages, micro-batches and what moves between them: receive, run the stage's blocks, send."""

from dist_int8.distributed import RankDied

__all__ = ["RankDied"]
