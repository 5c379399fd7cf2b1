"""The formats of a model's parameters, from settings and what a checkpoint has decided."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from dist_int8.config import Settings
from dist_int8.config.accuracy import DEFAULT_POINT, describe_numerics
from dist_int8.partition.memory import Formats

_SIXTEEN_BITS = ("float16", "bfloat16")


def choose_formats(settings: Settings, float_size: int, vocab_size: int) -> Formats:
    """Returns the formats under these settings; the sizes are bytes per element."""
    formats = Formats(
        settings.int8,
        float_size,
        vocab_size,
        embedding_int8=settings.int8 and settings.embedding == "int8",
        num_hot_columns=settings.numerics.num_hot_columns if settings.calibrates else 0,
        down_hot_columns=settings.numerics.down_hot_columns if settings.calibrates else 0,
        rotated=settings.int8 and settings.numerics.rotation > 0,
        kv_int8=settings.kv == "int8",
        skip=settings.skipped,
    )
    return replace(formats, head_int8=formats.is_int8("lm_head"))


def adopt_declared(settings: Settings, config: Any) -> Settings:
    """Returns the settings with what the config of an int8 checkpoint says that it has decided.

    Raises:
        ValueError: the settings contradict each other for it; without the file or command.
    """
    if not settings.int8:
        return settings
    written = getattr(config, "quantization_config", None)
    written = written if isinstance(written, dict) else {}
    stored_rotation = written.get("rotation", 0) if written else None
    if written.get("quant_method") == "dist_int8":
        settings = settings.model_copy(
            update={
                "accuracy": settings.accuracy or written.get("accuracy"),
                "skip_modules": written["skip_modules"],
                "head": None,
                "embedding": written.get("embedding", "16bit"),
                "calibrate": written.get("calibrate", "off"),
                "num_hot_columns": written.get("num_hot_columns", 0),
            }
        )
    return fix_numerics(settings, stored_rotation)


def fix_numerics(settings: Settings, stored_rotation: int | None) -> Settings:
    """Returns the settings with what their point of accuracy stands for.

    Args:
        settings: as they were given.
        stored_rotation: of the weights of an int8 checkpoint; None: they are floating-point.

    Raises:
        ValueError: the settings contradict each other; without the file or command.
    """
    numerics = settings.resolve_numerics(stored_rotation)
    point = settings.accuracy or DEFAULT_POINT
    return settings.model_copy(update={**asdict(numerics), "accuracy": point})


def choose_formats_for(settings: Settings, config: Any, devices: Sequence[str]) -> Formats:
    """Returns the formats from a model's config alone, whose dtype stands for that of its tensors.

    Args:
        settings: as `adopt_declared` returns them.
        config: of the model.
        devices: of the stages.
    """
    written = getattr(config, "quantization_config", None)
    declared: dict[str, Any] = {}
    if settings.int8 and isinstance(written, dict) and written.get("quant_method") == "dist_int8":
        declared["head_hot_columns"] = written.get("head_hot_columns", 0)
        usual = written.get("num_hot_columns", 0)
        declared["down_hot_columns"] = written.get("down_hot_columns", usual)
    stored = str(config.dtype or "").removeprefix("torch.")
    dtype: str = settings.dtype
    if dtype == "auto":
        dtype = "float32" if devices[0] == "cpu" else stored or "float16"
    float_size = 2 if dtype in _SIXTEEN_BITS else 4
    stored_size = 2 if stored in _SIXTEEN_BITS else 4
    formats = choose_formats(settings, float_size, min(float_size, stored_size))
    return replace(formats, hot_size=stored_size, **declared)


def describe_formats(settings: Settings, formats: Formats) -> str:
    """Describes the numerics of the int8 linears in a line; empty without any."""
    if not formats.int8:
        return ""
    counts = formats.num_hot_columns, formats.count_hot_columns("down")
    return describe_numerics(settings.accuracy, settings.numerics, *counts)
