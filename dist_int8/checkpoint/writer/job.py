"""A rewriting of a checkpoint that is checked and planned."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Job:
    """A rewriting that is checked and planned; nothing is written yet.

    Attributes:
        source: folder of the checkpoint to read.
        out: folder to write.
        num_bytes: of the tensors to write.
        num_shards: files they are cut into.
        num_bytes_read: by the calibration.
    """

    source: Path
    out: Path
    num_bytes: int
    num_shards: int
    num_bytes_read: int
    _run: Callable[[Callable[[int], object], Callable[[str], object]], bool]

    def run(
        self,
        progress: Callable[[int], object] = lambda num_bytes: None,
        note: Callable[[str], object] = lambda line: None,
    ) -> bool:
        """Writes `out`; False if it was there already, complete and from the same config.

        Args:
            progress: called with bytes read by the calibration, and with bytes written, or found
                written by an interrupted run.
            note: called with a line for the user.

        Raises:
            ValueError: `out` holds something else, another process is at it, or a weight is not
                finite.
            RuntimeError: the disk is full.
        """
        with torch.no_grad():
            return self._run(progress, note)
