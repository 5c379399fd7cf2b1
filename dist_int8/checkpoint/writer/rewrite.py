"""`quantize` and `dequantize`: a checkpoint from one form into another, tensor by tensor.

Source and target may be floating, ours or bitsandbytes'. What is int8 in both keeps its values.
Tensors keep transformers' names, one checkpoint linear each, so the result does not depend on how
our blocks join them or on any number of stages.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from dist_int8.checkpoint.calibrate import OFF, Calibration, find_hot_columns, make_calibration
from dist_int8.checkpoint.load import stage_bytes_to_read
from dist_int8.checkpoint.locate import Located, is_int8_checkpoint, locate
from dist_int8.checkpoint.random_weights import EMBEDDING, HEAD
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.checkpoint.writer.folder import CONFIG, HOT_COLUMNS, write_file, write_folder
from dist_int8.checkpoint.writer.formats import TargetFormat, make_config
from dist_int8.checkpoint.writer.job import Job
from dist_int8.checkpoint.writer.shards import Group, cut
from dist_int8.checkpoint.writer.tensors import bitsandbytes_group, floating_group, int8_group
from dist_int8.int8.convert import convert
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.config import describe, load_config
from dist_int8.models.decoder import DecoderStage
from dist_int8.models.spec import ModelSpec

_SMALL = (".json", ".txt", ".model", ".jinja")
_FLOAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SHARD_BYTES = 2 * 1000**3


def quantize(
    folder: str | Path,
    out: str | Path,
    *,
    target: TargetFormat = "dist_int8",
    skip: Sequence[str] = ("lm_head",),
    embedding_int8: bool = False,
    hot_columns: Mapping[str, Sequence[int]] | None = None,
    calibrate: str = OFF,
    num_hot_columns: int = 16,
    shard_bytes: int = SHARD_BYTES,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> Job:
    """Plan an int8 checkpoint of a floating one, or of an int8 one in another form.

    Args:
        folder: of the source. If it is int8 already, its int8 values and its choice of linears are
            kept; bitsandbytes has no hot columns, so that linears with some are quantized anew
            for it.
        out: new folder.
        target: "dist_int8" or "bitsandbytes" (loads in transformers).
        skip: linears that stay floating, by name component, as in `load_stage`.
        embedding_int8: the token embedding too, if the source is floating.
        hot_columns: input features to keep exactly, by our name of a linear ("blocks.0.qkv").
        calibrate: or find them with "random" tokens or a text file, block by block, when the job
            runs; see `calibrate.find_hot_columns`.
        num_hot_columns: of each linear that calibration finds.
        shard_bytes: size of the files; a tensor alone may be larger.
        device: where rows are quantized.
        allow_pickle: read `.bin` files where there is no safetensors file.

    Raises:
        ValueError: a damaged checkpoint, or arguments that do not fit it.
    """
    rewriter = _Rewriter(Path(folder), device, allow_pickle)
    if rewriter.is_int8:
        quantized = {target for target, entry in rewriter.located.items() if entry.is_int8}
        if hot_columns or calibrate != OFF:
            raise ValueError(
                f"{folder}: hot_columns must be chosen when a checkpoint is quantized, got them "
                "for one that is int8 already; start from the floating checkpoint"
            )
    else:
        quantized = rewriter.linears(skip) | ({EMBEDDING} if embedding_int8 else set())
    calibration = make_calibration(folder, rewriter.spec, calibrate, num_hot_columns)
    if calibration is not None and hot_columns:
        raise ValueError(
            f"quantize: calibrate must be off where hot_columns are given, got {calibrate!r}; "
            "leave one out"
        )
    if target == "bitsandbytes":
        quantized.discard(EMBEDDING)
        if hot_columns or calibration:
            raise ValueError(
                "quantize: hot_columns must be left out for bitsandbytes, which has none; "
                "write the dist_int8 format"
            )
        if rewriter.spec.tied_head and HEAD in quantized:
            raise ValueError(
                "quantize: skip must name lm_head for bitsandbytes, because the head is tied to "
                "the embedding; add it"
            )
    by_target = {f"{name}.weight": columns for name, columns in (hot_columns or {}).items()}
    for name, columns in by_target.items():
        if name not in quantized:
            raise ValueError(
                f"quantize: hot_columns must name int8 linears, got {name.removesuffix('.weight')};"
                " names are those of blocks, as in blocks.0.qkv"
            )
        rewriter.check_columns(name, columns)
    return rewriter.job(Path(out), target, quantized, by_target, shard_bytes, None, calibration)


def dequantize(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> Job:
    """Plan a floating checkpoint of an int8 one, ours or bitsandbytes' in any layout.

    Args:
        folder: of the int8 checkpoint.
        out: new folder.
        dtype: float32, float16 or bfloat16; None: that of the source's config.
        shard_bytes, device, allow_pickle: as in `quantize`.

    Raises:
        ValueError: a damaged checkpoint, or one without int8 weights.
    """
    rewriter = _Rewriter(Path(folder), device, allow_pickle)
    if not rewriter.is_int8:
        raise ValueError(
            f"{folder}: checkpoint must have int8 weights, got none; it is floating-point already"
        )
    chosen = dtype or rewriter.dtype
    if chosen not in _FLOAT_NAMES:
        raise ValueError(
            f"dequantize: dtype must be one of {', '.join(_FLOAT_NAMES)}, got {chosen!r}; "
            "choose one"
        )
    return rewriter.job(Path(out), "floating", set(), {}, shard_bytes, chosen)


class _Rewriter:
    def __init__(self, folder: Path, device: torch.device | str, allow_pickle: bool) -> None:
        self.folder = folder
        self.config = load_config(folder)
        self.spec: ModelSpec = describe(self.config)
        self.reader = CheckpointReader(folder, allow_pickle=allow_pickle, complete=False)
        blocks = range(self.spec.num_blocks)
        self.located = locate(self.reader, self.spec, blocks, first=True, last=True)
        self.is_int8 = is_int8_checkpoint(self.reader)
        self._device = device
        self._allow_pickle = allow_pickle

    @property
    def dtype(self) -> str:
        """The config's, of what is floating again."""
        return str(self.config.dtype or "float16").removeprefix("torch.")

    def linears(self, skip: Sequence[str]) -> set[str]:
        """Names of the weights that `load_stage` would quantize."""
        blocks = range(self.spec.num_blocks)
        stage = convert(DecoderStage.empty(self.spec, blocks, True, True), skip=skip)
        modules = dict(stage.named_modules())
        return {
            target
            for target in self.located
            if isinstance(modules[target.rpartition(".")[0]], Int8Linear)
            and target.endswith(".weight")
        }

    def check_columns(self, target: str, columns: Sequence[int]) -> None:
        """Raises ValueError for columns that the linear does not have."""
        num_inputs = self.located[target].pieces[0].shape[1]
        Int8Linear(num_inputs, 1, hot_columns=columns, device="meta")

    def job(
        self,
        out: Path,
        target: TargetFormat,
        quantized: set[str],
        hot_columns: Mapping[str, Sequence[int]],
        shard_bytes: int,
        dtype: str | None,
        calibration: Calibration | None = None,
    ) -> Job:
        groups: list[Group] = []
        floating_linears: list[str] = []
        floating_modules: list[str] = []
        linears = self.linears(())
        to_find: dict[str, torch.Tensor] = {}  # places for the columns, filled before a row is made
        for name, entry in self.located.items():
            if name in linears and name not in quantized:
                floating_linears.append(name.removesuffix(".weight"))
                # all names it may have: transformers itself renamed the head of GPT-NeoX
                floating_modules += [
                    other.removesuffix(".weight") for names in entry.source.names for other in names
                ]
            own = name in hot_columns or calibration is not None  # a head's own hot columns
            if not (own and name in quantized) and self._is_the_embedding_again(
                name, entry, quantized
            ):
                continue  # transformers ties them
            columns = entry.hot_columns
            if name in hot_columns:
                columns = torch.tensor(hot_columns[name], dtype=torch.int32)
            elif calibration and name in quantized and name.startswith(("blocks.", "lm_head.")):
                columns = torch.zeros(calibration.num_hot_columns, dtype=torch.int32)
                to_find[name.removesuffix(".weight")] = columns
            for piece, names in zip(entry.pieces, entry.source.names, strict=False):
                where = (self.reader, self._device, piece, names[0], columns)
                if name not in quantized:
                    chosen = dtype or (self.dtype if piece.scale is not None else None)
                    groups.append(floating_group(*where, chosen and _FLOAT_NAMES[chosen]))
                elif target == "bitsandbytes":
                    groups.append(bitsandbytes_group(*where))
                else:
                    groups.append(int8_group(*where))
        shards = cut(groups, shard_bytes)
        fields = json.loads((self.folder / CONFIG).read_text())
        config = make_config(
            fields,
            target,
            skip=floating_linears,
            skipped_modules=floating_modules,
            dtype=dtype,
            calibration=calibration,
            embedding_int8=EMBEDDING in quantized,
            head_hot_columns=len(to_find.get("lm_head", ())),
        )
        small_files = sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix in _SMALL
            and not path.name.endswith(".index.json")
            and path.name != CONFIG
            and path.is_file()
        )
        job = {
            "config": config,
            "tensors": [
                [[output.name, output.dtype, output.shape] for g in shard for output in g.outputs]
                for shard in shards
            ],
            "hot_columns": {name: list(columns) for name, columns in hot_columns.items()},
            "source": {
                path.name: [path.stat().st_size, path.stat().st_mtime_ns]
                for path in sorted(self.folder.iterdir())
                if path.is_file()
            },
        }

        num_bytes_read = self._bytes_to_calibrate() if to_find else 0

        def run(progress: Callable[[int], object], note: Callable[[str], object]) -> bool:
            def prepare(aside: Path) -> None:
                if calibration is not None:
                    path, head = aside / HOT_COLUMNS, "lm_head" in to_find
                    found = self._columns(path, calibration, head, progress)
                    for name, columns in to_find.items():
                        columns.copy_(torch.tensor(found[name]))

            return write_folder(out, config, small_files, shards, job, progress, note, prepare)

        num_bytes = sum(group.num_bytes for group in groups)
        return Job(self.folder, out, num_bytes, len(shards), num_bytes_read, run)

    def _columns(
        self,
        path: Path,
        calibration: Calibration,
        head: bool,
        progress: Callable[[int], object],
    ) -> dict[str, list[int]]:
        """What calibration finds, or found in a run that was interrupted."""
        if path.is_file():
            progress(self._bytes_to_calibrate())
            columns: dict[str, list[int]] = json.loads(path.read_text())
            return columns
        device = torch.device(self._device)
        dtype = torch.float32 if device.type == "cpu" else self.config.dtype or torch.float16
        columns = find_hot_columns(
            self.folder,
            self.spec,
            calibration,
            head=head,
            device=device,
            dtype=dtype,
            allow_pickle=self._allow_pickle,
            progress=progress,
        )
        write_file(path, json.dumps(columns).encode())
        return columns

    def _bytes_to_calibrate(self) -> int:
        blocks = range(self.spec.num_blocks)
        return stage_bytes_to_read(
            self.folder, self.spec, blocks, first=True, last=False, allow_pickle=self._allow_pickle
        )

    def _is_the_embedding_again(self, name: str, entry: Located, quantized: set[str]) -> bool:
        if name != HEAD or not self.spec.tied_head:
            return False
        same_format = (HEAD in quantized) == (EMBEDDING in quantized)
        return same_format and entry.names == self.located[EMBEDDING].names
