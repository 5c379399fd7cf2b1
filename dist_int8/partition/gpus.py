"""What GPUs this machine has: the one file that talks to cuda-python.

The CUDA driver is asked, never the runtime, so no context is created and no GPU memory is taken;
free memory comes from NVML, found by UUID so that CUDA_VISIBLE_DEVICES keeps its meaning.
Without a driver every question has an answer: no GPU, and why.
"""

import uuid
from dataclasses import dataclass
from typing import Any


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
