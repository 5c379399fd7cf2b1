"""Which device runs which stage, and how hidden states travel between them."""

from collections import Counter
from collections.abc import Sequence

from dist_int8.config import Settings
from dist_int8.partition.gpus import Gpus, probe


def choose_devices(settings: Settings, gpus: Gpus | None = None) -> list[str]:
    """Chooses the device of each stage, in order: "cpu" or "cuda:N".

    Without `devices` and `gpus` in the settings, each GPU gets a stage; without GPUs the CPU does.

    Raises:
        ValueError: the settings need more GPUs than are visible; the message says how many are.
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
    """Returns whether hidden states travel over NCCL between stages in separate processes.

    Args:
        settings: settings, of which `backend` and `in_process` decide.
        devices: device of every stage, "cpu" or "cuda:N".
        hosts: host of every stage, or any other name for a set of GPUs; None: one host has all.

    Raises:
        ValueError: NCCL is requested with a stage on the CPU, or would meet the same GPU twice,
            which makes it fail while connecting.
    """
    on_gpus = "cpu" not in devices
    if settings.backend == "nccl" and not on_gpus:
        raise ValueError(
            "load():backend: backend must be gloo where a stage is on the CPU, got nccl; "
            "leave it out"
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
