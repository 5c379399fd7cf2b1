"""Checkpoints: reading safetensors and quantizing each tensor as it arrives; `writer` writes."""

from dist_int8.checkpoint.calibrate import (
    OFF,
    RANDOM,
    Calibration,
    find_hot_columns,
    make_calibration,
)
from dist_int8.checkpoint.hub import resolve_model
from dist_int8.checkpoint.load import count_stage_bytes, load_stage
from dist_int8.checkpoint.locate import is_int8
from dist_int8.checkpoint.random_weights import make_random_stage
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.checkpoint.stage_format import StageFormat
from dist_int8.checkpoint.stored_format import StoredFormat, read_stored_format

__all__ = [
    "OFF",
    "RANDOM",
    "Calibration",
    "CheckpointReader",
    "StageFormat",
    "StoredFormat",
    "count_stage_bytes",
    "find_hot_columns",
    "is_int8",
    "load_stage",
    "make_calibration",
    "make_random_stage",
    "read_stored_format",
    "resolve_model",
]
