"""Rewriting a checkpoint: into int8 and back, with checksums that prove it complete."""

from dist_int8.checkpoint.writer import manifest
from dist_int8.checkpoint.writer.rewrite import dequantize, quantize

__all__ = ["dequantize", "manifest", "quantize"]
