"""A rewriting that is planned, and its execution."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_int8.checkpoint.calibrate import find_hot_columns
from dist_int8.checkpoint.matrices import Source
from dist_int8.checkpoint.writer.aside import Aside
from dist_int8.checkpoint.writer.durable import write_file
from dist_int8.checkpoint.writer.folder import write_folder
from dist_int8.checkpoint.writer.plan import RewritePlan
from dist_int8.checkpoint.writer.recipe import Recipe
from dist_int8.checkpoint.writer.stored_model import StoredModel
from dist_int8.checkpoint.writer.tensors import Made, make_tensors
from dist_int8.models.stage_slice import StageSlice

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Job:
    """A rewriting that is checked and planned; nothing is written yet.

    Attributes:
        plan: what is written.
        source: the checkpoint to read.
        device: where rows are worked on.
    """

    plan: RewritePlan
    source: StoredModel
    device: torch.device

    @property
    def out(self) -> Path:
        """Folder to write."""
        return self.plan.out

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors to write."""
        return self.plan.num_bytes

    @property
    def num_shards(self) -> int:
        """Files that the tensors are cut into."""
        return len(self.plan.shards)

    @property
    def num_bytes_read(self) -> int:
        """Bytes that the calibration reads."""
        return self.plan.num_bytes_read

    @torch.no_grad()
    def run(
        self,
        progress: Progress = lambda num_bytes: None,
        note: Callable[[str], object] = lambda line: None,
    ) -> bool:
        """Writes the folder; returns False if it was there, complete and of the same config.

        Args:
            progress: called with bytes read by the calibration, and with bytes written, or found
                written by an interrupted run.
            note: called with a line for the user.

        Raises:
            ValueError: the folder holds something else, another process is at work there, or a
                weight is not finite.
            RuntimeError: the disk is full.
        """

        def prepare(aside: Aside) -> Callable[[Recipe], Made]:
            found = self._find_hot_columns(aside, progress)
            return lambda recipe: self._make(recipe, found)

        return write_folder(self.plan, prepare, progress, note)

    def _make(self, recipe: Recipe, found: Mapping[str, Sequence[int]]) -> Made:
        hot_columns: Tensor | None = recipe.hot_columns
        if recipe.calibrated is not None:
            hot_columns = torch.tensor(found[recipe.calibrated], dtype=torch.int32)
        return make_tensors(recipe, Source(self.source.reader, self.device), hot_columns)

    def _find_hot_columns(self, aside: Aside, progress: Progress) -> dict[str, list[int]]:
        """Finds what calibration finds, or found in a run that was interrupted."""
        plan, source = self.plan, self.source
        if plan.calibration is None:
            return {}
        if aside.hot_columns.is_file():
            progress(plan.num_bytes_read)
            columns: dict[str, list[int]] = json.loads(aside.hot_columns.read_text())
            return columns
        blocks = range(source.spec.num_blocks)
        columns = find_hot_columns(
            source.folder,
            source.spec,
            plan.calibration,
            StageSlice(blocks, first=True, last=plan.calibrates_head),
            device=self.device,
            dtype=source.choose_calibration_dtype(self.device),
            allow_pickle=source.allow_pickle,
            progress=progress,
        )
        write_file(aside.hot_columns, json.dumps(columns).encode())
        return columns
