"""Building stages of a model from a checkpoint, slice by slice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dist_int8.checkpoint.arena import Arena
from dist_int8.checkpoint.locate import is_int8_checkpoint, locate
from dist_int8.checkpoint.matrices import Source
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.checkpoint.stage_filler import StageFiller
from dist_int8.checkpoint.stage_format import StageFormat
from dist_int8.checkpoint.stored_format import list_floating_linears
from dist_int8.checkpoint.tied_head import EMBEDDING, HEAD
from dist_int8.models.decoder import DecoderStage
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice

_DEFAULT_FORMAT = StageFormat()


def load_stage(
    folder: str | Path,
    spec: ModelSpec,
    stage_slice: StageSlice,
    stage_format: StageFormat = _DEFAULT_FORMAT,
    *,
    device: torch.device | str = "cpu",
    hot_columns: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[int], object] | None = None,
    allow_pickle: bool = False,
) -> DecoderStage:
    """Builds a stage and fills it from a checkpoint.

    The stage is made on the meta device; then each parameter gets its place on `device` and is
    filled from its checkpoint tensors by slices of some MiB, quantized there as they arrive. Host
    memory holds a few slices besides what stays on the CPU, however large a tensor is (a matrix in
    an old tiled layout: twice its int8 size). Linears that the checkpoint stores in int8 are taken
    as they are, hot columns included.

    Args:
        folder: a local model folder.
        spec: `models.describe` of its config.
        stage_slice: the part of the model to load.
        stage_format: how to hold it. An int8 checkpoint has decided which linears stay floating
            and whether the embedding does.
        device: where the stage lives.
        hot_columns: input features that linears keep exactly, by name ("blocks.0.qkv"), of a
            checkpoint that is not int8.
        progress: called with the number of checkpoint bytes just read.
        allow_pickle: read `.bin` files where there is no safetensors file.

    Raises:
        ValueError: before anything is allocated, naming every missing, misshapen, non-floating or
            unknown tensor of the checkpoint.
    """
    loader = StageLoader(Path(folder), spec, stage_format, device, progress, allow_pickle)
    return loader.load(stage_slice, hot_columns)


@dataclass(frozen=True)
class StageLoader:
    """Loads stages of one checkpoint, all in one form; see `load_stage`."""

    folder: Path
    spec: ModelSpec
    stage_format: StageFormat = _DEFAULT_FORMAT
    device: torch.device | str = "cpu"
    progress: Callable[[int], object] | None = None
    allow_pickle: bool = False

    def load(
        self, stage_slice: StageSlice, hot_columns: Mapping[str, Sequence[int]] | None = None
    ) -> DecoderStage:
        """Loads a stage."""
        stage, filler = self._begin(stage_slice)
        with torch.no_grad():
            filler.fill(hot_columns or {})
        return stage.eval()

    def load_embedding_rows(self, rows: Tensor) -> DecoderStage:
        """Loads a first stage without blocks and with some rows of the floating embedding.

        Args:
            rows: their numbers, int64 [U], ascending. Row i of the stage's embedding is `rows[i]`.
        """
        stage, filler = self._begin(StageSlice(range(0), first=True, last=False))
        with torch.no_grad():
            filler.fill({}, without=EMBEDDING)
            filler.fill_floating(EMBEDDING, rows)
        return stage.eval()

    def load_before_head(self) -> DecoderStage:
        """Loads a last stage without blocks and head, for its `before_head`."""
        stage, filler = self._begin(StageSlice(range(0), first=False, last=True))
        with torch.no_grad():
            filler.fill({}, without=HEAD)
        return stage.eval()

    def _begin(self, stage_slice: StageSlice) -> tuple[DecoderStage, StageFiller]:
        """Makes a stage that is empty, and what fills it."""
        reader = CheckpointReader(self.folder, allow_pickle=self.allow_pickle, complete=False)
        located = locate(reader, self.spec, stage_slice)
        stage_format = self.stage_format
        if stage_format.int8 and is_int8_checkpoint(reader):
            stage_format = replace(
                stage_format,
                skip=list_floating_linears(located),
                embedding_int8=stage_slice.first and located[EMBEDDING].is_int8,
            )
        stage = stage_format.make_empty_stage(self.spec, stage_slice)
        stage.move_tables(self.device)
        source = Source(reader, self.device, self.progress)
        # Floating linears may be swapped one by one later, and give their memory back then.
        arena = Arena(self.device, separate=not stage_format.int8)
        return stage, StageFiller(stage, located, source, arena)


def count_stage_bytes(
    folder: str | Path, spec: ModelSpec, stage_slice: StageSlice, *, allow_pickle: bool = False
) -> int:
    """Counts the checkpoint bytes that loading a stage reads, each tensor once.

    Raises:
        ValueError: as `load_stage`.
    """
    reader = CheckpointReader(folder, allow_pickle=allow_pickle, complete=False)
    located = locate(reader, spec, stage_slice)
    names = {name for entry in located.values() for name in entry.names}
    return sum(reader.num_bytes(name) for name in names)
