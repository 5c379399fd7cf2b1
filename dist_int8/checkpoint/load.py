"""Building one stage of a model from a checkpoint, slice by slice."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_int8.checkpoint.arena import Arena
from dist_int8.checkpoint.locate import Located, Piece, is_int8_checkpoint, locate, may_be_int8
from dist_int8.checkpoint.matrices import Source
from dist_int8.checkpoint.random_weights import (
    EMBEDDING,
    HEAD,
    fill_with_random_weights,
    has_same_format,
    share_embedding,
)
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.checkpoint.tensor_files import TORCH_DTYPES
from dist_int8.int8.convert import convert
from dist_int8.int8.embedding import Int8Embedding
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.decoder import DecoderStage
from dist_int8.models.spec import ModelSpec


def random_stage(
    spec: ModelSpec,
    blocks: range,
    *,
    first: bool,
    last: bool,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vocab_dtype: torch.dtype = torch.float32,
    outlier_rule: str = "absolute",
    outlier_threshold: float = 6.0,
    int8: bool = True,
    skip: Collection[str] = ("lm_head",),
    embedding_int8: bool = False,
    num_hot_columns: int = 0,
    max_tokens: int | None = None,
) -> DecoderStage:
    """The stage that `load_stage` builds, with random weights made on `device`, no checkpoint.

    The first `num_hot_columns` input features of the int8 linears of the blocks and of an int8 head
    are the hot ones.
    """
    stage = DecoderStage.empty(spec, blocks, first, last, dtype, max_tokens)
    if int8:
        convert(stage, outlier_threshold=outlier_threshold, outlier_rule=outlier_rule, skip=skip)
        if embedding_int8:
            stage.make_embedding_int8()
    return fill_with_random_weights(stage, device, vocab_dtype, num_hot_columns)


@dataclass(frozen=True)
class StoredFormat:
    """What a checkpoint holds, and an int8 one has decided."""

    is_int8: bool
    """Whether anything in it is int8."""
    skip: tuple[str, ...]
    """Linears that it holds in floating point, by name component."""
    num_hot_columns: int
    """The most hot columns of any linear of a block."""
    head_hot_columns: int
    """Hot columns of the head."""
    linear_size: int
    """The most bytes of an element of what a linear of a block has in floating point."""
    embedding_int8: bool


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
    embedding_int8: bool = False,
    hot_columns: Mapping[str, Sequence[int]] | None = None,
    embedding_rows: Tensor | None = None,
    head: bool = True,
    progress: Callable[[int], object] | None = None,
    max_tokens: int | None = None,
    allow_pickle: bool = False,
) -> DecoderStage:
    """Build a stage and fill it from a checkpoint.

    The stage is made on the meta device; then each parameter gets its place on `device` and is
    filled from its checkpoint tensors by slices of some MiB, quantized there as they arrive. Host
    memory holds a few slices besides what stays on the CPU, however large a tensor is (a matrix in
    an old tiled layout: twice its int8 size). Linears that the checkpoint stores in int8 are taken
    as they are, hot columns included.

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
        int8: False: keep every linear in `dtype`, also what is stored in int8.
        skip: linears that stay floating, by name component; of an int8 checkpoint those that it
            holds in floating point stay so instead.
        embedding_int8: hold the token embedding in int8 (with `int8`); an int8 checkpoint has
            decided.
        hot_columns: input features that linears keep exactly, by name ("blocks.0.qkv"), of a
            checkpoint that is not int8.
        embedding_rows: int64 [U], in ascending order; hold only these rows of the embedding.
        head: False: of the last stage's head hold only what stands before it.
        progress: called with the number of checkpoint bytes just read.
        max_tokens: longest sequence to prepare positions for; None: the model's own limit.
        allow_pickle: read `.bin` files where there is no safetensors file.

    Raises:
        ValueError: before anything is allocated, naming every missing, misshapen, non-floating or
            unknown tensor of the checkpoint.
    """
    reader = CheckpointReader(folder, allow_pickle=allow_pickle, complete=False)
    located = locate(reader, spec, blocks, first=first, last=last)
    stage = DecoderStage.empty(spec, blocks, first, last, dtype, max_tokens)
    if int8:
        if is_int8_checkpoint(reader):
            skip = _floating_linears(located)
            embedding_int8 = first and located[EMBEDDING].is_int8
        convert(stage, outlier_threshold=outlier_threshold, outlier_rule=outlier_rule, skip=skip)
        if embedding_int8:
            stage.make_embedding_int8()
    device = torch.device(device)
    stage.move_tables(device)
    source = Source(reader, device, progress)
    # Floating linears may be swapped one by one later, and give their memory back then.
    arena = Arena(device, separate=not int8)

    with torch.no_grad():
        for target, entry in located.items():
            if target == HEAD and not head:
                continue
            own = target == HEAD and bool((hot_columns or {}).get("lm_head"))
            if target == HEAD and first and not own and _shares_embedding(stage, located, reader):
                share_embedding(stage)
                continue
            path, _, kind = target.rpartition(".")
            module = stage.get_submodule(path)
            if isinstance(module, Int8Linear | Int8Embedding):
                if kind == "weight":
                    _fill_int8(module, entry, source, arena, (hot_columns or {}).get(path))
                else:
                    module.bias = _floating(entry, source, arena, dtype)
                continue
            stored = {reader.dtype(name) for name in entry.names}
            keeps_16_bits = path in ("embedding", "lm_head") and dtype == torch.float32
            wanted = dtype
            if keeps_16_bits and len(stored) == 1 and (name := stored.pop()) in ("F16", "BF16"):
                wanted = TORCH_DTYPES[name]
            rows = embedding_rows if target == EMBEDDING else None
            filled = _floating(entry, source, arena, wanted, rows)
            setattr(module, kind, nn.Parameter(filled, requires_grad=False))
    return stage.eval()


def stage_bytes_to_read(
    folder: str | Path,
    spec: ModelSpec,
    blocks: range,
    *,
    first: bool,
    last: bool,
    allow_pickle: bool = False,
) -> int:
    """Checkpoint bytes of a stage, each tensor once.

    Raises:
        ValueError: as `load_stage`.
    """
    reader = CheckpointReader(folder, allow_pickle=allow_pickle, complete=False)
    located = locate(reader, spec, blocks, first=first, last=last)
    names = {name for entry in located.values() for name in entry.names}
    return sum(reader.num_bytes(name) for name in names)


def stored_format(
    folder: str | Path, spec: ModelSpec, *, allow_pickle: bool = False
) -> StoredFormat:
    """What the checkpoint holds.

    Raises:
        ValueError: as `load_stage`, for the whole model.
    """
    reader = CheckpointReader(folder, allow_pickle=allow_pickle, complete=False)
    located = locate(reader, spec, range(spec.num_blocks), first=True, last=True)
    num_hot, sizes = [0], [0]
    for target, entry in located.items():
        if entry.hot_columns is not None and target != HEAD:
            num_hot.append(len(entry.hot_columns))
        if target.startswith("blocks.") and may_be_int8(target, entry.source):
            names = [piece.hot_weight if entry.is_int8 else piece.name for piece in entry.pieces]
            dtypes = [reader.dtype(name) for name in names if name is not None]
            sizes += [TORCH_DTYPES[dtype].itemsize for dtype in dtypes]
    return StoredFormat(
        is_int8_checkpoint(reader),
        _floating_linears(located),
        max(num_hot),
        0 if (columns := located[HEAD].hot_columns) is None else len(columns),
        max(sizes),
        located[EMBEDDING].is_int8,
    )


def _floating_linears(located: dict[str, Located]) -> tuple[str, ...]:
    return tuple(
        target.removesuffix(".weight")
        for target, entry in located.items()
        if target != EMBEDDING and may_be_int8(target, entry.source) and not entry.is_int8
    )


def _shares_embedding(
    stage: DecoderStage, located: dict[str, Located], reader: CheckpointReader
) -> bool:
    """Whether head and embedding of a stage with both are one table in memory."""
    if not stage.spec.tied_head or not has_same_format(stage):
        return False
    head, embedding = located[HEAD], located[EMBEDDING]
    if head.is_int8 != embedding.is_int8 or head.hot_columns is not None:
        return False
    # A tied checkpoint may hold the head too; transformers ties them only if they are equal.
    return head.names == embedding.names or (
        len(head.names) == len(embedding.names)
        and all(map(partial(_equal, reader), head.names, embedding.names))
    )


def _floating(
    entry: Located,
    source: Source,
    arena: Arena,
    dtype: torch.dtype,
    only: Tensor | None = None,
) -> Tensor:
    """The parameter in `dtype`; `only` the rows of these numbers, ascending."""
    if not entry.pieces:
        return entry.source.assemble([]).to(arena.device, dtype)
    num_rows = sum(piece.shape[0] for piece in entry.pieces) if only is None else len(only)
    out = arena.empty((num_rows, *entry.pieces[0].shape[1:]), dtype)
    for begin, piece in _beginnings(entry):
        for first, rows in source.floating(piece, entry.hot_columns):
            if only is None:
                _put(out, entry.order, begin + first, rows)
                continue
            left, right = torch.searchsorted(only, torch.tensor([first, first + len(rows)]))
            out[left:right] = rows[(only[left:right] - first).to(rows.device)]
    return out


def _fill_int8(
    module: Int8Linear | Int8Embedding,
    entry: Located,
    source: Source,
    arena: Arena,
    columns: Sequence[int] | None,
) -> None:
    N, K = module.weight_int8.shape
    weight_int8 = arena.empty((N, K), torch.int8)
    col_scale = arena.empty((N,), torch.float32)
    hot_weight: Tensor | None = None
    hot_columns = entry.hot_columns
    if columns and not entry.is_int8:
        hot_columns = torch.tensor(columns, dtype=torch.int32)
    for begin, piece in _beginnings(entry):
        for part in source.int8(piece, hot_columns):
            _put(weight_int8, entry.order, begin + part.first, part.weight_int8)
            _put(col_scale, entry.order, begin + part.first, part.col_scale)
            if part.hot_weight is not None:
                if hot_weight is None:
                    shape = (N, part.hot_weight.shape[1])
                    hot_weight = arena.empty(shape, part.hot_weight.dtype)
                _put(hot_weight, entry.order, begin + part.first, part.hot_weight)
    module.weight_int8, module.col_scale = weight_int8, col_scale
    if hot_columns is not None:
        module.hot_columns, module.hot_weight = hot_columns.to(arena.device), hot_weight


def _beginnings(entry: Located) -> list[tuple[int, Piece]]:
    """Each piece with the number of stored rows before it."""
    begin, beginnings = 0, []
    for piece in entry.pieces:
        beginnings.append((begin, piece))
        begin += piece.shape[0]
    return beginnings


def _put(out: Tensor, order: Tensor | None, first: int, rows: Tensor) -> None:
    """Stored rows to their places."""
    end = first + len(rows)
    if order is None:
        out[first:end] = rows
    else:
        out.index_copy_(0, order[first:end].to(out.device), rows.to(out.dtype))


def _equal(reader: CheckpointReader, name: str, other: str) -> bool:
    pairs = zip(reader.slices(name), reader.slices(other), strict=True)
    return all(torch.equal(rows, other_rows) for (_, rows), (_, other_rows) in pairs)
