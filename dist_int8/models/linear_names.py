"""Names of linears, ours and the checkpoint's, in lists of what stays in floating point."""

import logging
from collections.abc import Collection

from dist_int8.int8.convert import is_skipped
from dist_int8.models.config import tensor_sources
from dist_int8.models.notice import warn_once
from dist_int8.models.sources import TensorSource
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice

_TABLES = ("embedding.weight", "positions.weight")

logger = logging.getLogger(__name__)


def resolve_skip(spec: ModelSpec, skip: Collection[str], where: str) -> tuple[str, ...]:
    """Translates a list of linears that stay floating into our names.

    Our linears join some of the checkpoint's (query, key and value; gate and up). A name of one of
    those keeps the whole matrix floating, which is logged.

    Args:
        spec: the model.
        skip: one or several whole components of a linear's name, ours ("qkv", "blocks.0") or the
            checkpoint's ("q_proj", "model.layers.0.mlp").
        where: the list, for messages.

    Raises:
        ValueError: a name that no linear of the model has.
    """
    linears = {
        target.removesuffix(".weight"): source
        for target, source in tensor_sources(spec, StageSlice.whole(spec)).items()
        if target not in _TABLES and target.endswith(".weight") and len(source.shapes[0]) == 2
    }
    resolved: list[str] = []
    for entry in skip:
        if any(is_skipped(name, [entry]) for name in linears):
            resolved.append(entry)
            continue
        matched = [name for name, source in linears.items() if any(_match(source, entry))]
        if not matched:
            raise ValueError(
                f"{where}: must name linears of the model ({', '.join(_list_known(linears))}), got "
                f"{entry!r}; correct or remove it"
            )
        if partly := [name for name in matched if not all(_match(linears[name], entry))]:
            warn_once(
                logger,
                f"{where}: {entry!r} is part of {', '.join(_shorten(partly, linears))}, which "
                "stays in floating point as a whole",
            )
        resolved += _shorten(matched, linears)
    return tuple(dict.fromkeys(resolved))


def _match(source: TensorSource, entry: str) -> list[bool]:
    """Says of each of the checkpoint's linears in a matrix whether it goes by the name."""
    return [
        any(is_skipped(name.removesuffix(".weight"), [entry]) for name in names)
        for names in source.names
    ]


def _shorten(names: list[str], linears: Collection[str]) -> list[str]:
    """Writes "qkv" for the linears of that name in all blocks."""
    kinds = {name.rpartition(".")[2] for name in names}
    whole = {
        kind
        for kind in kinds
        if all(name in names for name in linears if name.rpartition(".")[2] == kind)
    }
    return list(
        dict.fromkeys(
            kind if (kind := name.rpartition(".")[2]) in whole else name for name in names
        )
    )


def _list_known(linears: dict[str, TensorSource]) -> list[str]:
    """Lists the last components of all names, ours and the checkpoint's."""
    stored = [
        name.removesuffix(".weight").rpartition(".")[2]
        for source in linears.values()
        for names in source.names
        for name in names
    ]
    return list(dict.fromkeys([*(name.rpartition(".")[2] for name in linears), *stored]))
