"""Assigns blocks to stages by bytes. Pure Python: no torch, no device, no weights."""

from dist_int8.partition.planner import Plan, StagePlan, plan_stages

__all__ = ["Plan", "StagePlan", "plan_stages"]
