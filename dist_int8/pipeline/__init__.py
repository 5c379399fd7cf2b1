"""Stages, micro-batches and what moves between them: receive, run the stage's blocks, send."""
