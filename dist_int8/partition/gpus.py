"""The GPUs of this machine: the one file that talks to cuda-python.

Only the CUDA driver is queried, never the runtime, so no context is created and no GPU memory is
taken. Free memory comes from NVML, looked up by UUID so that CUDA_VISIBLE_DEVICES keeps its
meaning. Without a driver the answer is "no GPU" and the reason.
"""

import uuid
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: number that the driver gives it, the N of torch's cuda:N.
        name: name of the product.
        compute_capability: major and minor version.
        total_bytes: bytes of memory.
        free_bytes: bytes of free memory; None where NVML does not say.
        peers: indices of the GPUs whose memory this one reads directly.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    free_bytes: int | None
    peers: tuple[int, ...]


@dataclass(frozen=True)
class Gpus:
    """All visible GPUs.

    Attributes:
        gpus: GPUs, in the driver's order.
        reason: reason why there are none; None if there are some.
        driver: CUDA version of the driver, such as "13.0"; None without one.
    """

    gpus: tuple[Gpu, ...]
    reason: str | None
    driver: str | None


def probe() -> Gpus:
    """Queries the driver. Never raises: an error becomes the reason for an empty list."""
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
    except Exception as error:  # a missing library or a failing driver means "no GPU"
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
    except Exception:  # NVML is optional: absent in some containers, different under MIG
        return None


def _call(driver: Any, name: str, *arguments: object) -> Any:
    """Makes one driver call and returns its result; RuntimeError names a call that fails."""
    status, *results = getattr(driver, name)(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"the CUDA driver answered {status.name} to {name}")
    return results[0] if results else None


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())
