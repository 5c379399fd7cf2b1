"""Allocating the parameters of a stage on a device and filling them, slice by slice."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dist_int8.checkpoint.arena import Arena
from dist_int8.checkpoint.located import Located
from dist_int8.checkpoint.matrices import Source
from dist_int8.checkpoint.piece import Piece
from dist_int8.checkpoint.stored_format import list_floating_names
from dist_int8.checkpoint.tensor_files import TORCH_DTYPES
from dist_int8.checkpoint.tied_head import EMBEDDING, HEAD, is_shared, share_embedding
from dist_int8.int8.embedding import Int8Embedding
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.decoder import DecoderStage


class StageFiller:
    """Fills an empty stage from a checkpoint.

    Args:
        stage: with its parameters on the meta device.
        located: where each of them is stored.
        source: reads them.
        arena: where the parameters are placed.
    """

    def __init__(
        self, stage: DecoderStage, located: dict[str, Located], source: Source, arena: Arena
    ) -> None:
        self._stage = stage
        self._located = located
        self._source = source
        self._arena = arena

    def fill(self, hot_columns: Mapping[str, Sequence[int]], without: str | None = None) -> None:
        """Fills every parameter.

        Args:
            hot_columns: input features that a linear keeps exactly, by its name.
            without: parameter to leave on the meta device.
        """
        for target, entry in self._located.items():
            if target == without:
                continue
            if target == HEAD and self._shares_embedding(hot_columns):
                share_embedding(self._stage)
                continue
            path, _, kind = target.rpartition(".")
            module = self._stage.get_submodule(path)
            if not isinstance(module, Int8Linear | Int8Embedding):
                self.fill_floating(target)
            elif kind == "weight":
                self._fill_int8(module, entry, hot_columns.get(path))
            else:
                module.bias = self._read_floating(entry, self._stage.dtype)

    def fill_floating(self, target: str, only: Tensor | None = None) -> None:
        """Fills a floating parameter; `only` its rows of these numbers, int64, ascending."""
        path, _, kind = target.rpartition(".")
        entry = self._located[target]
        filled = self._read_floating(entry, self._choose_dtype(path, entry), only)
        module = self._stage.get_submodule(path)
        setattr(module, kind, nn.Parameter(filled, requires_grad=False))

    def _shares_embedding(self, hot_columns: Mapping[str, Sequence[int]]) -> bool:
        has_own_columns = bool(hot_columns.get("lm_head"))
        if not self._stage.slice.first or has_own_columns:
            return False
        head = self._stage.lm_head
        if isinstance(head, Int8Linear) and not self._located[HEAD].is_int8 and head.rotation:
            return False
        return is_shared(self._stage, self._located, self._source.reader)

    def _choose_dtype(self, path: str, entry: Located) -> torch.dtype:
        dtype = self._stage.dtype
        stored = {self._source.reader.float_dtype(name) for name in entry.names}
        if path in (EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")):
            keeps_16_bits = dtype == torch.float32 and len(stored) == 1
            if keeps_16_bits and (name := stored.pop()) in ("F16", "BF16"):
                return TORCH_DTYPES[name]
        return dtype

    def _read_floating(
        self, entry: Located, dtype: torch.dtype, only: Tensor | None = None
    ) -> Tensor:
        if not entry.pieces:
            return entry.source.assemble([]).to(self._arena.device, dtype)
        num_rows = sum(piece.shape[0] for piece in entry.pieces) if only is None else len(only)
        out = self._arena.empty((num_rows, *entry.pieces[0].shape[1:]), dtype)
        for begin, piece in _list_beginnings(entry):
            for first, rows in self._source.floating(piece, entry.hot_columns):
                if only is None:
                    _put(out, entry.order, begin + first, rows)
                    continue
                left, right = torch.searchsorted(only, torch.tensor([first, first + len(rows)]))
                out[left:right] = rows[(only[left:right] - first).to(rows.device)]
        return out

    def _fill_int8(
        self,
        module: Int8Linear | Int8Embedding,
        entry: Located,
        columns: Sequence[int] | None,
    ) -> None:
        N, K = module.weight_int8.shape
        weight_int8 = self._arena.empty((N, K), torch.int8)
        col_scale = self._arena.empty((N,), torch.float32)
        hot_weight: Tensor | None = None
        hot_columns = entry.hot_columns
        if columns and not entry.is_int8:
            hot_columns = torch.tensor(columns, dtype=torch.int32)
        rotation = 0
        if isinstance(module, Int8Linear):
            module.rotation = entry.rotation if entry.is_int8 else module.rotation
            rotation = module.rotation
        for begin, piece in _list_beginnings(entry):
            for part in self._source.int8(piece, hot_columns, rotation):
                _put(weight_int8, entry.order, begin + part.first, part.weight_int8)
                _put(col_scale, entry.order, begin + part.first, part.col_scale)
                if part.hot_weight is not None:
                    if hot_weight is None:
                        dtype = self._source.reader.common_dtype(list_floating_names(entry))
                        hot_weight = self._arena.empty((N, part.hot_weight.shape[1]), dtype)
                    _put(hot_weight, entry.order, begin + part.first, part.hot_weight)
        module.weight_int8, module.col_scale = weight_int8, col_scale
        if hot_columns is not None:
            module.hot_columns, module.hot_weight = hot_columns.to(self._arena.device), hot_weight
        if isinstance(module, Int8Linear):
            module.pack_()


def _list_beginnings(entry: Located) -> list[tuple[int, Piece]]:
    """Lists each piece with the number of stored rows before it."""
    begin, beginnings = 0, []
    for piece in entry.pieces:
        beginnings.append((begin, piece))
        begin += piece.shape[0]
    return beginnings


def _put(out: Tensor, order: Tensor | None, first: int, rows: Tensor) -> None:
    """Copies stored rows to their places."""
    end = first + len(rows)
    if order is None:
        out[first:end] = rows
    else:
        out.index_copy_(0, order[first:end].to(out.device), rows.to(out.dtype))
