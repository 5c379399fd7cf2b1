"""What GPUs this machine has: the one file that talks to cuda-python.

The CUDA driver is asked, never the runtime, so no context is created and no GPU memory is taken;
free memory comes from NVML, found by UUID so that CUDA_VISIBLE_DEVICES keeps its meaning.
Without a driver every question has an answer: no GPU, and why.
"""

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_int8.config import Settings


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver numbers it (the same numbers as torch's cuda:N)."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    free_bytes: int | None  # None where NVML does not say
    peers: tuple[int, ...]  # indices of the GPUs whose memory this one reads directly


@dataclass(frozen=True)
class Gpus:
    """All visible GPUs; `reason` says why there is none, `driver` is e.g. "13.0"."""

    gpus: tuple[Gpu, ...]
    reason: str | None
    driver: str | None


def probe() -> Gpus:
    """Asks the driver. Never raises: what goes wrong becomes the reason for an empty list."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        return Gpus(
            (), f"cuda-bindings (part of cuda-python) is not importable ({_flat(error)})", None
        )
    try:
        _call(driver, "cuInit", 0)
        version = _call(driver, "cuDriverGetVersion")
        count = _call(driver, "cuDeviceGetCount")
        gpus = tuple(_gpu(driver, index, count) for index in range(count))
    except Exception as error:  # a missing library, a driver that refuses: all mean "no GPU"
        missing = (
            type(error).__name__ == "DynamicLibNotFoundError"
        )  # cuda-pathfinder's, for libcuda
        return Gpus((), "no CUDA driver is installed" if missing else _flat(error), None)
    reason = None if gpus else "the driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)"
    return Gpus(gpus, reason, f"{version // 1000}.{version % 1000 // 10}")


def choose_devices(settings: Settings, gpus: Gpus | None = None) -> list[str]:
    """The device of each stage: "cpu" or "cuda:N", one a stage, in order.

    Without `devices` and `gpus` in the settings: one stage a GPU if there are GPUs, else the CPU.
    Raises ValueError, naming how many GPUs are seen, when more are asked for.
    """
    if settings.devices is not None and all(device == "cpu" for device in settings.devices):
        return list(settings.devices)
    found = gpus if gpus is not None else probe()
    if settings.devices is not None:
        for device in settings.devices:
            if device != "cpu" and int(device.removeprefix("cuda:")) >= len(found.gpus):
                raise ValueError(_too_few("devices", f"among the {_seen(found)}", device))
        return list(settings.devices)
    if settings.gpus is not None:
        if settings.gpus > len(found.gpus):
            raise ValueError(
                _too_few("gpus", f"at most the number of {_seen(found)}", settings.gpus)
            )
        return [f"cuda:{index}" for index in range(settings.gpus)]
    num_stages = settings.num_stages or max(1, len(found.gpus))
    if found.gpus and num_stages > len(found.gpus):
        raise ValueError(_too_few("stages", f"at most the number of {_seen(found)}", num_stages))
    return [f"cuda:{index}" if found.gpus else "cpu" for index in range(num_stages)]


def connects_over_nccl(
    settings: Settings, devices: Sequence[str], hosts: Sequence[str] | None
) -> bool:
    """Whether hidden states travel over NCCL between stages in processes of their own.

    Args:
        settings: `backend` and `in_process` decide.
        devices: "cpu" or "cuda:N" of every stage.
        hosts: machine of every stage, or whoever else has GPUs of its own; None: one has all.

    Raises:
        ValueError: NCCL is asked for with a stage on the CPU, or meets the same GPU twice, which
            it would fail at while connecting.
    """
    on_gpus = "cpu" not in devices
    if settings.backend == "nccl" and not on_gpus:
        raise ValueError(
            "load():backend: backend must be gloo where a stage is on the CPU, got nccl; leave it "
            "out"
        )
    if settings.in_process or len(devices) == 1 or settings.backend == "gloo" or not on_gpus:
        return False
    places = Counter(zip(hosts or ["localhost"] * len(devices), devices, strict=True))
    (_, device), count = places.most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"load():devices: devices must name each GPU once where NCCL connects the stages, got "
            f"{device} for {count} stages; set backend to gloo, or in_process to true"
        )
    return True


def _seen(found: Gpus) -> str:
    reason = f" ({found.reason})" if found.reason else ""
    return f"GPUs seen, {len(found.gpus)}{reason}"


def _too_few(key: str, expected: str, actual: object) -> str:
    return (
        f"load():{key}: {key} must be {expected}, got {actual}; "
        'use --device cpu (devices=["cpu", ...] in Python) or a machine with enough GPUs'
    )


def _gpu(driver: Any, index: int, count: int) -> Gpu:
    device = _call(driver, "cuDeviceGet", index)
    attribute = driver.CUdevice_attribute
    major, minor = (
        _call(driver, "cuDeviceGetAttribute", getattr(attribute, name), device)
        for name in (
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
        )
    )
    peers = tuple(
        other
        for other in range(count)
        if other != index
        and _call(driver, "cuDeviceCanAccessPeer", device, _call(driver, "cuDeviceGet", other))
    )
    return Gpu(
        index=index,
        name=_call(driver, "cuDeviceGetName", 256, device).split(b"\0")[0].decode(),
        compute_capability=(major, minor),
        total_bytes=_call(driver, "cuDeviceTotalMem", device),
        free_bytes=_free_bytes(_call(driver, "cuDeviceGetUuid", device).bytes),
        peers=peers,
    )


def _free_bytes(device_uuid: bytes) -> int | None:
    try:
        from cuda.core import system

        return int(system.Device(uuid=f"GPU-{uuid.UUID(bytes=device_uuid)}").memory_info.free)
    except Exception:  # NVML is a convenience: absent in some containers, other under MIG
        return None


def _call(driver: Any, name: str, *arguments: object) -> Any:
    """One driver call: its result without the status, or a RuntimeError that names the call."""
    status, *results = getattr(driver, name)(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"the CUDA driver answered {status.name} to {name}")
    return results[0] if results else None


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())
