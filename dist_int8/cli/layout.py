"""The flags that say where stages run (--device, --stages, --gpus, --devices), as settings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_int8.config import load_settings


def choose_layout(
    source: str, config: Path | None, device: str | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Chooses stages, gpus and devices for --device; without it, they are as given.

    Args:
        source: how an error begins.
        config: YAML file of settings, which may name a number of stages.
        device: cpu or cuda for every stage, or None.
        given: values by field of `Settings`.

    Returns:
        Values of `stages`, `gpus` and `devices`; None: not given.

    Raises:
        ValueError: another device, or one together with --devices or --gpus.
    """
    stages, gpus, devices = (given.get(key) for key in ("stages", "gpus", "devices"))
    if device is None:
        return {"stages": stages, "gpus": gpus, "devices": devices}
    _check_device(source, device, gpus, devices)
    if device == "cpu":
        stages = _count_stages(config) if stages is None else stages
        if isinstance(stages, list):
            return {"stages": stages, "gpus": None, "devices": ["cpu"] * len(stages)}
        if isinstance(stages, int) and stages > 0:
            return {"stages": None, "gpus": None, "devices": ["cpu"] * stages}
        return {"stages": stages, "gpus": None, "devices": None}  # refused by the settings
    if stages is None and gpus is None:
        from dist_int8.partition.gpus import probe

        num_gpus = len(probe().gpus)
        if num_gpus and "WORLD_SIZE" in os.environ:
            return {}  # each rank takes the GPU of its local rank
        gpus = max(1, num_gpus)
    if gpus is None:
        gpus = len(stages) if isinstance(stages, list) else stages
    return {"stages": stages, "gpus": gpus, "devices": None}


def _check_device(source: str, device: str, gpus: object, devices: object) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"{source}:device: device must be cpu or cuda, got {device!r}; "
            "use --devices to name the device of each stage"
        )
    if devices is not None or (device == "cpu" and gpus is not None):
        other = "--devices" if devices is not None else "--gpus"
        raise ValueError(
            f"{source}:device: --device {device} must be given alone, got {other} with it; "
            "keep one of the two"
        )


def _count_stages(config: Path | None) -> int:
    """Number of stages of the file, else of the launcher, else 1."""
    file = load_settings(config)
    named = file.num_stages or file.gpus or len(file.devices or ())
    return named or int(os.environ.get("WORLD_SIZE") or 1)
