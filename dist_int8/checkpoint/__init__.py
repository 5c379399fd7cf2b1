"""Checkpoints: reading safetensors, quantizing each tensor as it arrives (`writer`: writing)."""

from dist_int8.checkpoint.calibrate import (
    OFF,
    RANDOM,
    Calibration,
    find_hot_columns,
    make_calibration,
)
from dist_int8.checkpoint.hub import resolve_model
from dist_int8.checkpoint.load import load_stage, random_stage, stage_bytes_to_read, stored_format
from dist_int8.checkpoint.locate import is_int8
from dist_int8.checkpoint.reader import CheckpointReader

__all__ = [
    "OFF",
    "RANDOM",
    "Calibration",
    "CheckpointReader",
    "find_hot_columns",
    "is_int8",
    "load_stage",
    "make_calibration",
    "random_stage",
    "resolve_model",
    "stage_bytes_to_read",
    "stored_format",
]
