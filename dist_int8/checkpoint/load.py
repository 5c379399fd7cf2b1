"""Building one stage of a model from a checkpoint, one tensor at a time."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.int8.convert import convert
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.config import ignored_tensors, tensor_sources
from dist_int8.models.decoder import DecoderStage
from dist_int8.models.sources import TensorSource
from dist_int8.models.spec import ModelSpec

_FLOATING = {"F32": 4, "F16": 2, "BF16": 2}  # bytes an element
_SHOWN = 12  # problems named in full in one error


@dataclass(frozen=True)
class _Located:
    """A source with each of its names settled."""

    source: TensorSource
    names: tuple[str, ...]


def load_stage(
    folder: str | Path,
    spec: ModelSpec,
    blocks: range,
    *,
    first: bool,
    last: bool,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    outlier_rule: str = "absolute",
    outlier_threshold: float = 6.0,
    int8: bool = True,
    skip: Collection[str] = ("lm_head",),
    progress: Callable[[int], object] | None = None,
    max_tokens: int | None = None,
) -> DecoderStage:
    """Build a stage and fill it from a safetensors checkpoint.

    The stage is made on the meta device; then each parameter is assembled from its checkpoint
    tensors, moved to `device`, quantized there if it belongs to an `Int8Linear`, and its sources
    are let go. Host memory holds one assembled parameter at a time besides what stays on the CPU.

    Args:
        folder: a local model folder.
        spec: `models.describe` of its config.
        blocks: contiguous block numbers of the stage.
        first: holds the embedding.
        last: holds the final norm and the head.
        device: where the stage lives.
        dtype: dtype of floating parameters and of hidden states. With float32, embedding and head
            keep a 16-bit dtype they are stored in.
        outlier_rule: rule of the `Int8Linear` layers.
        outlier_threshold: threshold of that rule.
        int8: False: keep every linear in `dtype`.
        skip: linears that stay floating, by name component.
        progress: called with the number of checkpoint bytes just read.
        max_tokens: longest sequence to prepare positions for; None: the model's own limit.

    Raises:
        ValueError: before anything is allocated, naming every missing, misshapen, non-floating or
            unknown tensor of the checkpoint.
    """
    reader = CheckpointReader(folder)
    located = _locate(reader, spec, blocks, first, last)
    stage = DecoderStage.empty(spec, blocks, first, last, dtype, max_tokens)
    if int8:
        convert(stage, outlier_threshold=outlier_threshold, outlier_rule=outlier_rule, skip=skip)
    stage.move_tables(device)
    device = torch.device(device)

    unreported = _tensor_names(located)

    def assemble(target: str) -> Tensor:
        entry = located[target]
        tensor = entry.source.assemble([reader.read(name) for name in entry.names])
        newly_read = unreported.intersection(entry.names)
        unreported.difference_update(newly_read)
        if progress is not None and newly_read:
            progress(_num_bytes(reader, newly_read))
        return tensor

    def shares_embedding() -> bool:
        if not (spec.tied_head and first) or isinstance(stage.lm_head, Int8Linear):
            return False
        head, embedding = (located[f"{side}.weight"].names[0] for side in ("lm_head", "embedding"))
        # A tied checkpoint may hold the head too; transformers ties them only if they are equal.
        return head == embedding or torch.equal(reader.read(head), reader.read(embedding))

    with torch.no_grad():
        for target in located:
            if target == "lm_head.weight" and shares_embedding():
                stage.lm_head.weight = stage.embedding.weight
                continue
            path, _, kind = target.rpartition(".")
            module = stage.get_submodule(path)
            if isinstance(module, Int8Linear):
                if kind == "weight":  # quantize_ takes weight and bias together
                    bias = f"{path}.bias"
                    module.quantize_(
                        assemble(target).to(device),
                        assemble(bias).to(device, dtype, copy=True) if bias in located else None,
                    )
                continue
            tensor = assemble(target)
            if path in ("embedding", "lm_head") and dtype == torch.float32 and tensor.itemsize == 2:
                tensor = tensor.to(device, copy=True)
            else:
                tensor = tensor.to(device, dtype, copy=True)
            setattr(module, kind, nn.Parameter(tensor, requires_grad=False))
    return stage.eval()


def stage_bytes_to_read(
    folder: str | Path, spec: ModelSpec, blocks: range, *, first: bool, last: bool
) -> int:
    """Checkpoint bytes of a stage, each tensor once.

    Raises:
        ValueError: as `load_stage`.
    """
    reader = CheckpointReader(folder)
    return _num_bytes(reader, _tensor_names(_locate(reader, spec, blocks, first, last)))


def _tensor_names(located: dict[str, _Located]) -> set[str]:
    return {name for entry in located.values() for name in entry.names}


def _num_bytes(reader: CheckpointReader, names: set[str]) -> int:
    return sum(
        torch.Size(reader.shape(name)).numel() * _FLOATING[reader.dtype(name)] for name in names
    )


def _locate(
    reader: CheckpointReader, spec: ModelSpec, blocks: range, first: bool, last: bool
) -> dict[str, _Located]:
    """Settle every name of the stage, or raise one error with all that is wrong."""
    whole = tensor_sources(spec, range(spec.num_blocks), first=True, last=True)
    known = {name for source in whole.values() for names in source.names for name in names}
    ignored = re.compile("|".join(ignored_tensors(spec)) or r"(?!)")
    problems = [
        f"unknown tensor {name}"
        for name in reader.names
        if name not in known and not ignored.search(name)
    ]
    located: dict[str, _Located] = {}
    for target, source in tensor_sources(spec, blocks, first=first, last=last).items():
        names = []
        for candidates, shape in zip(source.names, source.shapes, strict=False):
            name = next((name for name in candidates if name in reader), None)
            if name is None:
                problems.append(f"missing tensor {candidates[0]}")
            elif reader.shape(name) != shape:
                problems.append(
                    f"{name} must have shape {list(shape)}, got {list(reader.shape(name))}"
                )
            elif reader.dtype(name) not in _FLOATING:
                problems.append(f"{name} must be floating-point, got {reader.dtype(name)}")
            else:
                names.append(name)
        located[target] = _Located(source, tuple(names))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"{reader.folder}: checkpoint must fit its config.json, got {len(problems)} "
            f"problem(s): {'; '.join(problems[:_SHOWN])}{more}; check that config and weights "
            "belong together"
        )
    return located
