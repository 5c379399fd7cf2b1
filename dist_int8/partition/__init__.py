"""Assigns blocks to stages by bytes and time. Pure Python: no torch, no devices, no weights."""

from dist_int8.partition.activations import Workload
from dist_int8.partition.memory import Formats
from dist_int8.partition.plan import Plan, StagePlan, format_bytes
from dist_int8.partition.planner import CutOptions, Device, plan_stages
from dist_int8.partition.profiles import PROFILES, DeviceProfile
from dist_int8.partition.questions import Question, ask, check

__all__ = [
    "PROFILES",
    "CutOptions",
    "Device",
    "DeviceProfile",
    "Formats",
    "Plan",
    "Question",
    "StagePlan",
    "Workload",
    "ask",
    "check",
    "format_bytes",
    "plan_stages",
]
