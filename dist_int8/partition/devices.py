"""Which device runs which stage, and how hidden states travel between them."""

from collections import Counter
from collections.abc import Sequence

from dist_int8.config import Settings
from dist_int8.partition.gpus import Gpus, probe


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
