"""`convert`: swap the linears of a module for `Int8Linear`."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from dist_int8.int8 import checks, convertible
from dist_int8.int8.linear import Int8Linear
from dist_int8.int8.rotation import check_rotation

HEAD = "lm_head"  # skipped by default, whether a module has one or not

_SKIPPED = "skipped"

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """One module of a tree.

    Attributes:
        names: the qualified names that it has, more than one where it is shared.
        why: None for a linear to swap; else why it is left alone.
    """

    names: list[str]
    why: str | None


def convert(
    module: nn.Module,
    *,
    outlier_threshold: float = 6.0,
    outlier_rule: str | None = None,
    skip: Collection[str] = (HEAD,),
    hot_columns: Mapping[str, Sequence[int]] | None = None,
    rotation: int = 0,
) -> nn.Module:
    """Swaps every linear inside `module` for an `Int8Linear`, in place; returns `module`.

    Linears are `nn.Linear`, Falcon's own class and the Conv1D of GPT-2. What may do more than a
    product stays as it is, and a warning names it: other subclasses of `nn.Linear`, linears with
    hooks, matrices that a module multiplies itself (experts, the projections of
    `nn.MultiheadAttention`). So do the adapters of peft's layers, whose base layers are swapped. A
    linear used under two names stays one layer. Each floating weight is freed as soon as its linear
    is swapped, if nothing else holds it. Linears on the meta device give layers on the meta device.

        name = "HuggingFaceTB/SmolLM2-135M"
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
        dist_int8.convert(model)
        logits = model(input_ids).logits

    Args:
        module: for example a model of transformers.
        outlier_threshold, outlier_rule: which elements of an input count as outliers, as in
            `Int8Linear`, with its defaults.
        skip: linears to leave alone, whose qualified name has one of these as one or several whole
            components ("lm_head"; "mlp.down"; "layers.0").
        hot_columns: by qualified name, the input features that a linear keeps in floating point.
        rotation: as of `Int8Linear`.

    Raises:
        ValueError: an unknown rule, a bad threshold or rotation, hot columns that a linear does not
            have, a name in `skip` or `hot_columns` that is none of a linear, weights in a dtype
            that is not read, a `module` that is itself a linear, or one in which there is nothing
            to swap. Nothing is swapped then.
    """
    if convertible.floating(module) is not None:
        raise ValueError(
            f"convert: module must contain linears, got a {type(module).__name__}; "
            "use Int8Linear.from_linear"
        )
    if isinstance(skip, str):
        raise ValueError(f"convert: skip must be a list of names, got {skip!r}; write [{skip!r}]")
    checks.check_outlier_rule(outlier_rule or "none", outlier_threshold)
    check_rotation(rotation)
    places = _list_places(module, skip)
    _check_names(module, places, skip, hot_columns or {})
    _check_weights(module, places)
    swapped = [place.names[0] for place in places if place.why is None]
    left = _describe(module, places)
    if not swapped and not any(isinstance(child, Int8Linear) for child in module.modules()):
        raise ValueError(
            f"convert: {type(module).__name__} must contain linears to swap, got none; "
            + (f"it has {left}" if left else "give the module that holds them")
        )
    swap_linears(
        module,
        outlier_threshold=outlier_threshold,
        outlier_rule=outlier_rule,
        skip=skip,
        hot_columns=hot_columns,
        rotation=rotation,
    )
    logger.info("convert: %d linears are int8: %s", len(swapped), ", ".join(swapped))
    if left := _describe(module, [place for place in places if place.why != _SKIPPED]):
        logger.warning("convert: left as it is: %s", left)
    return module


def swap_linears(
    module: nn.Module,
    *,
    outlier_threshold: float = 6.0,
    outlier_rule: str | None = None,
    skip: Collection[str] = (HEAD,),
    hot_columns: Mapping[str, Sequence[int]] | None = None,
    rotation: int = 0,
) -> nn.Module:
    """`convert` for a module whose make is known: it may have nothing to swap or to skip."""
    for names, why in _list_places(module, skip):
        if why is not None:
            continue
        columns = next((c for name in names if (c := (hot_columns or {}).get(name))), None)
        linear = module.get_submodule(names[0])
        layer = Int8Linear.from_linear(linear, outlier_threshold, outlier_rule, columns, rotation)
        del linear
        for name in names:
            module.set_submodule(name, layer)
    return module


def is_skipped(qualified_name: str, skip: Collection[str]) -> bool:
    """Whether `skip` names the linear as `convert` understands it."""
    return any(f".{skipped}." in f".{qualified_name}." for skipped in skip)


def _list_places(module: nn.Module, skip: Collection[str]) -> list[Place]:
    """Lists the modules that hold matrices, each once, and what becomes of them.

    It does not hold the modules themselves: that would keep all their weights alive to the end.
    """
    places: dict[tuple[int, str | None], Place] = {}
    adapters = tuple(_iter_adapters(module))
    for name, child in module.named_modules(remove_duplicate=False):
        is_linear = convertible.floating(child) is not None
        if not is_linear and not convertible.has_matrices(child):
            continue
        why: str | None
        if is_skipped(name, skip):
            why = _SKIPPED
        elif f"{name}.".startswith(adapters):
            why = "adapters"
        elif not is_linear:
            why = "may do more than a product"
        else:
            why = "has hooks" if convertible.is_watched(child) else None
        places.setdefault((id(child), why), Place([], why)).names.append(name)
    return list(places.values())


def _iter_adapters(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_modules():
        for adapter in convertible.list_adapters(child):
            yield f"{name}.{adapter}." if name else f"{adapter}."


def _check_names(
    module: nn.Module,
    places: list[Place],
    skip: Collection[str],
    hot_columns: Mapping[str, Sequence[int]],
) -> None:
    """Raises ValueError for names in `skip` and `hot_columns` that nothing has, and bad columns."""
    known = [name for name, _ in module.named_modules(remove_duplicate=False)]
    for pattern in skip:
        if pattern != HEAD and not any(is_skipped(name, [pattern]) for name in known):
            raise ValueError(
                f"convert: skip must name modules of {type(module).__name__}, got {pattern!r}; "
                "give whole components of a qualified name, such as 'mlp.down' or 'layers.0'"
            )
    swapped = {name for place in places if place.why is None for name in place.names}
    for name, columns in hot_columns.items():
        if name not in swapped:
            raise ValueError(
                f"convert: hot_columns must have names of linears that are swapped, got {name!r}; "
                "give the qualified name"
            )
        linear = convertible.floating(module.get_submodule(name))
        assert linear is not None
        Int8Linear(linear.weight.shape[1], 1, hot_columns=columns, device="meta")


def _check_weights(module: nn.Module, places: list[Place]) -> None:
    for names, why in places:
        linear = convertible.floating(module.get_submodule(names[0]))
        if why is None and linear and linear.weight.dtype not in checks.FLOAT_DTYPES:
            raise ValueError(
                f"convert: {names[0]}.weight must be float32, bfloat16 or float16, got "
                f"{linear.weight.dtype}; convert the module with .float() first, or skip it"
            )


def _describe(module: nn.Module, places: list[Place]) -> str:
    """Names what is left alone, by class and reason: at most three names of each."""
    groups: dict[str, list[str]] = {}
    for names, why in places:
        if why is not None:
            kind = type(module.get_submodule(names[0])).__name__
            groups.setdefault(f"{kind}, {why}", []).append(names[0] or "itself")
    return "; ".join(
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} ({kind})"
        for kind, names in groups.items()
    )
