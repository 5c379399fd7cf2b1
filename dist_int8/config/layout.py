"""Types of the fields that say where stages run: devices, stages, memory."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from dist_int8.config.byte_size import parse_byte_size
from dist_int8.config.checked import show

MAX_STAGES = 1024  # no model has as many blocks
_DEVICE = re.compile(r"cpu|cuda:(0|[1-9]\d{0,2})")


def _check_device(device: object) -> str:
    if isinstance(device, str) and _DEVICE.fullmatch(device):
        return device
    raise ValueError(
        f"must be cpu or cuda:N, got {show(device)}; write [cpu, cpu] or [cuda:0, cuda:1]"
    )


def _check_stages(stages: object) -> object:
    is_list = isinstance(stages, list | tuple)
    counts: Sequence[object] = stages if isinstance(stages, list | tuple) else [stages]
    highest = math.inf if is_list else MAX_STAGES
    if counts and all(type(count) is int and 1 <= count <= highest for count in counts):
        return list(counts) if is_list else stages
    expected = "a list of numbers of blocks, each at least 1" if is_list else "at least 1"
    if not is_list and type(stages) is not int:
        expected = "an integer or a list of integers"
    elif not is_list and isinstance(stages, int) and stages > MAX_STAGES:
        expected = f"at most {MAX_STAGES}"
    raise ValueError(f"must be {expected}, got {show(stages)}; write 4 or [17, 18, 18, 17]")


def _parse_memory(memory: object) -> object:
    if isinstance(memory, Mapping):
        return {_check_device(device): parse_byte_size(size) for device, size in memory.items()}
    if isinstance(memory, Sequence) and not isinstance(memory, str):
        return [parse_byte_size(size) for size in memory]
    raise ValueError(
        f"must be a list (one byte size per stage) or a mapping of device to byte size, "
        f'got {show(memory)}; write [79GiB, 79GiB] or {{"cuda:0": 79GiB}}'
    )


Device = Annotated[str, BeforeValidator(_check_device)]
Stages = Annotated[
    int | list[int] | None,
    BeforeValidator(lambda stages: None if stages is None else _check_stages(stages)),
]
Memory = Annotated[
    dict[str, int] | Annotated[list[int], Field(min_length=1)] | None,
    BeforeValidator(lambda memory: None if memory is None else _parse_memory(memory)),
]


def check_memory(
    memory: list[int] | dict[str, int] | None, devices: list[str] | None, num_stages: int | None
) -> None:
    """Raises ValueError for a budget that leaves a stage out, where the stages are known."""
    if isinstance(memory, list) and num_stages not in (None, len(memory)):
        raise ValueError(
            f"memory: memory must be one byte size per stage, {num_stages}, "
            f"got {len(memory)}; write one per stage or a mapping of device to byte size"
        )
    if isinstance(memory, dict) and devices is not None:
        for device in devices:
            if device not in memory:
                raise ValueError(
                    f"memory: memory must name every device, got no {device}; "
                    f"add {device} to the mapping"
                )
