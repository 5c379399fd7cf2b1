"""`convert`: swap the linears of a module for `Int8Linear`."""

from collections.abc import Collection

from torch import nn

from dist_int8.int8.linear import Int8Linear


def convert(
    module: nn.Module,
    *,
    outlier_threshold: float = 6.0,
    outlier_rule: str = "absolute",
    skip: Collection[str] = ("lm_head",),
) -> nn.Module:
    """Swaps every `nn.Linear` inside `module` for an `Int8Linear`, in place; returns `module`.

    Left alone are the linears whose qualified name has `skip` in it as one or several whole
    components ("lm_head"; "mlp.down"; "layers.0"), and subclasses of `nn.Linear`, which may do more
    than a product. A linear used under two names stays one layer. Each floating weight is freed as
    soon as its linear is swapped (if nothing else holds it); linears on the meta device give layers
    on the meta device. Raises ValueError for an unknown rule, a bad threshold, or a `module` that
    is itself a linear.
    """
    if type(module) is nn.Linear:
        raise ValueError(
            "convert: module must contain linears, got a Linear; use Int8Linear.from_linear"
        )
    if isinstance(skip, str):
        raise ValueError(f"convert: skip must be a list of names, got {skip!r}; write [{skip!r}]")
    for same_linear in _places(module, skip):
        parent, name = same_linear[0]
        layer = Int8Linear.from_linear(getattr(parent, name), outlier_threshold, outlier_rule)
        for parent, name in same_linear:
            setattr(parent, name, layer)
    return module


def _places(module: nn.Module, skip: Collection[str]) -> list[list[tuple[nn.Module, str]]]:
    """For every linear to swap, the (parent, name) pairs it stands at.

    It does not hold the linears themselves: that would keep all their weights alive to the end.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent_name, parent in module.named_modules():
        for name, child in parent._modules.items():
            if type(child) is nn.Linear and not _is_skipped(f"{parent_name}.{name}", skip):
                places.setdefault(id(child), []).append((parent, name))
    return list(places.values())


def _is_skipped(qualified_name: str, skip: Collection[str]) -> bool:
    return any(f".{skipped}." in f".{qualified_name}." for skipped in skip)
