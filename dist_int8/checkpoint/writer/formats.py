"""What config.json says of a quantized checkpoint, ours and bitsandbytes'."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dist_int8.checkpoint.calibrate import Calibration
from dist_int8.models.config import INT8_VERSION

TargetFormat = Literal["dist_int8", "bitsandbytes", "floating"]


def make_config(
    fields: Mapping[str, Any],
    target: TargetFormat,
    *,
    skip: Sequence[str] = (),
    skipped_modules: Sequence[str] = (),
    dtype: str | None = None,
    calibration: Calibration | None = None,
    embedding_int8: bool = False,
    head_hot_columns: int = 0,
) -> dict[str, Any]:
    """The config.json of a rewritten checkpoint.

    Args:
        fields: the source's config.json.
        target: what it is rewritten to.
        skip: our names of the linears that stay floating.
        skipped_modules: transformers' names of the same.
        dtype: of the floating tensors, where it changes.
        calibration: what the hot columns were found with.
        embedding_int8: the token embedding is int8.
        head_hot_columns: hot columns of an int8 head.
    """
    config = {key: value for key, value in fields.items() if key != "quantization_config"}
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if target == "dist_int8":
        config["quantization_config"] = {
            "quant_method": "dist_int8",
            "version": INT8_VERSION,
            "skip_modules": list(skip),
        }
        before = fields.get("quantization_config") or {}
        # of an int8 checkpoint, kept
        for key in ("num_hot_columns", "head_hot_columns", "calibrate"):
            if before.get("quant_method") == "dist_int8" and key in before:
                config["quantization_config"][key] = before[key]
        if embedding_int8:
            config["quantization_config"]["embedding"] = "int8"
        if calibration is not None:
            config["quantization_config"] |= {
                "num_hot_columns": calibration.num_hot_columns,
                "calibrate": calibration.source,
            }
            if head_hot_columns:
                config["quantization_config"]["head_hot_columns"] = head_hot_columns
    elif target == "bitsandbytes":
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": list(skipped_modules),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }
    return config
