"""What a launcher told this process: its rank and the number of ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dist_int8.distributed import slurm


@dataclass(frozen=True)
class Launched:
    """This process's place among the ranks that a launcher started."""

    rank: int
    world_size: int
    local_rank: int


def find_launched() -> Launched | None:
    """The ranks of the launcher around this process, or None in a plain session.

    Raises:
        ValueError: RANK and WORLD_SIZE contradict each other.
    """
    slurm.adopt()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    values = {}
    for name, default in (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        try:
            values[name] = int(text or "")
        except ValueError:
            raise ValueError(
                f"environment: {name} must be an integer, got {text!r}; unset it or use a launcher"
            ) from None
    if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
        raise ValueError(
            f"environment: RANK must be 0 to WORLD_SIZE - 1 = {values['WORLD_SIZE'] - 1}, "
            f"got {values['RANK']}; fix the launcher's environment"
        )
    return Launched(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])
