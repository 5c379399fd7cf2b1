"""What config.json says of a rewritten checkpoint, in our form and in bitsandbytes'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_int8.checkpoint.tied_head import EMBEDDING
from dist_int8.checkpoint.writer.target import Target
from dist_int8.models.quantization import INT8_VERSION, ROTATED_VERSION

# Fields that describe the source's files: the new folder has others.
_OF_THE_SOURCE = ("quantization_config", "transformers_weights")


@dataclass(frozen=True)
class FloatingLinears:
    """The linears that stay floating.

    Attributes:
        names: our names.
        modules: transformers' names, all that each may have.
    """

    names: Sequence[str]
    modules: Sequence[str]


def make_config(
    fields: Mapping[str, Any], target: Target, floating: FloatingLinears, head_hot_columns: int
) -> dict[str, Any]:
    """Makes the config.json of a rewritten checkpoint.

    Args:
        fields: the source's config.json.
        target: what it is rewritten to.
        floating: what stays floating.
        head_hot_columns: number of hot columns that calibration finds for an int8 head.
    """
    config = {key: value for key, value in fields.items() if key not in _OF_THE_SOURCE}
    if target.dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = target.dtype
    if target.form == "dist_int8":
        before = fields.get("quantization_config") or {}
        config["quantization_config"] = _describe_ours(before, target, floating, head_hot_columns)
    elif target.form == "bitsandbytes":
        config["quantization_config"] = _describe_bitsandbytes(floating)
    return config


def _describe_ours(
    before: Mapping[str, Any], target: Target, floating: FloatingLinears, head_hot_columns: int
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "dist_int8",
        "version": INT8_VERSION,
        "skip_modules": list(floating.names),
    }
    if target.rotation:
        config |= {"version": ROTATED_VERSION, "rotation": target.rotation}
    if target.accuracy is not None:
        config["accuracy"] = target.accuracy
    if before.get("quant_method") == "dist_int8":  # an int8 checkpoint keeps its hot columns
        kept = ("num_hot_columns", "down_hot_columns", "head_hot_columns", "calibrate", "accuracy")
        config |= {key: before[key] for key in kept if key in before}
    if EMBEDDING in target.quantized:
        config["embedding"] = "int8"
    if target.calibration is not None:
        config["num_hot_columns"] = target.calibration.num_hot_columns
        config["calibrate"] = target.calibration.source
        if (in_down := target.calibration.down_hot_columns) is not None:
            config["down_hot_columns"] = in_down
        if head_hot_columns:
            config["head_hot_columns"] = head_hot_columns
    return config


def _describe_bitsandbytes(floating: FloatingLinears) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(floating.modules),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
