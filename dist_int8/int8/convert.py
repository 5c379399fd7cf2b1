"""`convert`: swap the linears of a module for `Int8Linear`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from dist_int8.int8.linear import Int8Linear


def convert(
    module: nn.Module,
    *,
    outlier_threshold: float = 6.0,
    outlier_rule: str = "absolute",
    skip: Collection[str] = ("lm_head",),
    hot_columns: Mapping[str, Sequence[int]] | None = None,
) -> nn.Module:
    """Swaps every `nn.Linear` inside `module` for an `Int8Linear`, in place; returns `module`.

    Subclasses of `nn.Linear` are left alone, because they may do more than a product. A linear used
    under two names stays one layer. Each floating weight is freed as soon as its linear is swapped,
    if nothing else holds it. Linears on the meta device give layers on the meta device.

        name = "HuggingFaceTB/SmolLM2-135M"
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
        dist_int8.convert(model)
        logits = model(input_ids).logits

    Args:
        module: for example a model of transformers.
        outlier_threshold, outlier_rule: which elements of an input count as outliers, as in
            `Int8Linear`.
        skip: linears to leave alone, whose qualified name has one of these as one or several whole
            components ("lm_head"; "mlp.down"; "layers.0").
        hot_columns: by qualified name, the input features that a linear keeps in floating point.

    Raises:
        ValueError: an unknown rule, a bad threshold, hot columns that a linear does not have, or a
            `module` that is itself a linear.
    """
    if type(module) is nn.Linear:
        raise ValueError(
            "convert: module must contain linears, got a Linear; use Int8Linear.from_linear"
        )
    if isinstance(skip, str):
        raise ValueError(f"convert: skip must be a list of names, got {skip!r}; write [{skip!r}]")
    for names in _places(module, skip):
        columns = next((c for name in names if (c := (hot_columns or {}).get(name))), None)
        linear: Any = module.get_submodule(names[0])
        layer = Int8Linear.from_linear(linear, outlier_threshold, outlier_rule, columns)
        del linear
        for name in names:
            module.set_submodule(name, layer)
    return module


def is_skipped(qualified_name: str, skip: Collection[str]) -> bool:
    """Whether `skip` names the linear as `convert` understands it."""
    return any(f".{skipped}." in f".{qualified_name}." for skipped in skip)


def _places(module: nn.Module, skip: Collection[str]) -> list[list[str]]:
    """Lists, for every linear to swap, the qualified names that it has.

    It does not hold the linears themselves: that would keep all their weights alive to the end.
    """
    places: dict[int, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if type(child) is nn.Linear and not is_skipped(name, skip):
            places.setdefault(id(child), []).append(name)
    return list(places.values())
