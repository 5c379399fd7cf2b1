"""Checkpoints: reading safetensors, quantizing each tensor as it arrives."""

from dist_int8.checkpoint.load import load_stage, stage_bytes_to_read
from dist_int8.checkpoint.reader import CheckpointReader, resolve_model

__all__ = ["CheckpointReader", "load_stage", "resolve_model", "stage_bytes_to_read"]
