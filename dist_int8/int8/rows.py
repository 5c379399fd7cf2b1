"""The ops that work row by row: compiled where the library has a kernel, else plain torch."""

import torch
from torch import Tensor

from dist_int8.int8 import checks, plain, reference
from dist_int8.int8.activations import ACTIVATIONS
from dist_int8.int8.library import load
from dist_int8.int8.reference import QuantizedRows
from dist_int8.int8.registry import has_kernel, has_op

_COMPILED = load()
# The compiled ops, resolved once; None where the library does not have them.
_ops = torch.ops.dist_int8
_quantize_rows = _ops.quantize_rows.default if _COMPILED else None
_add_norm = _ops.add_norm.default if _COMPILED else None
_norm = _ops.norm.default if _COMPILED else None
_silu_mul = _ops.silu_mul.default if _COMPILED else None
_add_norm_quantize = _ops.add_norm_quantize.default if has_op("add_norm_quantize") else None
_silu_mul_quantize = _ops.silu_mul_quantize.default if has_op("silu_mul_quantize") else None
_activation_quantize = _ops.activation_quantize.default if has_op("activation_quantize") else None
_ON_CUDA = has_kernel("quantize_rows", "CUDA")  # all of them, or none

_RULES = {rule: index for index, rule in enumerate(checks.OUTLIER_RULES)}
_KINDS = {"rms": 0, "layer": 1}
_ACTIVATIONS = {name: index for index, name in enumerate(ACTIVATIONS)}


def quantize_rows(
    x: Tensor,
    outlier_rule: str,
    outlier_threshold: float,
    hot_columns: Tensor | None = None,
    rotation: int = 0,
) -> QuantizedRows:
    """x [M, K] (fp32, bf16, fp16) -> its planes, scales, flags of outlier tiles and hot columns.

    x ~= row_scale * (x_int8 + 128 * x_high), of x rotated where there is a `rotation`; see
    `reference.quantize_rows`, which this equals bit for bit. hot_columns: int32 [H] in 0..K-1 (on a
    GPU the range is not checked: it would take a host read). Raises ValueError for shapes, dtypes,
    rules and rotations, and for K > 131072.
    """
    if _quantize_rows is not None and _has_kernels(x):
        return QuantizedRows(
            *_quantize_rows(
                x.contiguous(),
                rule_index(outlier_rule, outlier_threshold),
                outlier_threshold,
                hot_columns,
                rotation,
            )
        )
    return reference.quantize_rows(x, outlier_rule, outlier_threshold, hot_columns, rotation)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """x, residual [T, K] or None, weight [K], bias [K] or None -> (normed, total), both [T, K].

    total = x + residual in x's dtype (x itself without a residual). kind "rms": normed = total /
    sqrt(mean(total^2) + eps) * weight (Zhang and Sennrich 2019); "layer": the same of total -
    mean(total) (Ba et al. 2016); + bias; in fp32, rounded to x's dtype once. Raises ValueError for
    shapes, dtypes and an unknown kind.
    """
    norm_kind = norm_kind_index("add_norm", kind)
    if _add_norm is not None and _norm is not None and _has_kernels(x):
        if residual is None:
            x = x.contiguous()
            return _norm(x, weight, bias, eps, norm_kind), x
        return _add_norm(x.contiguous(), residual.contiguous(), weight, bias, eps, norm_kind)
    total = x if residual is None else x + residual
    return plain.norm(total, weight, bias, eps, kind), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 * I] -> silu(gate_up[:, :I]) * gate_up[:, I:] [T, I], in gate_up's dtype.

    Computed in fp32. The gated unit of Shazeer 2020 (SwiGLU). Raises ValueError for an odd width.
    """
    if _silu_mul is not None and _has_kernels(gate_up):
        return _silu_mul(gate_up.contiguous())
    return plain.silu_mul(gate_up)


def add_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    outlier_rule: str,
    outlier_threshold: float,
    hot_columns: Tensor | None = None,
    rotation: int = 0,
) -> tuple[QuantizedRows, Tensor]:
    """`add_norm` and `quantize_rows` of its first result in one pass -> (rows, total).

    The normed rows are rounded to x's dtype before they are quantized, as between the two ops. On
    CPU the result is that of the two ops, bit for bit. Arguments and errors as there.
    """
    norm_kind = norm_kind_index("add_norm_quantize", kind)
    if _add_norm_quantize is not None and _has_kernels(x):
        x = x.contiguous()
        total, *rows = _add_norm_quantize(
            x,
            None if residual is None else residual.contiguous(),
            weight,
            bias,
            eps,
            norm_kind,
            rule_index(outlier_rule, outlier_threshold),
            outlier_threshold,
            hot_columns,
            rotation,
        )
        return QuantizedRows(*rows), x if residual is None else total
    normed, total = add_norm(x, residual, weight, bias, eps, kind)
    return quantize_rows(normed, outlier_rule, outlier_threshold, hot_columns, rotation), total


def silu_mul_quantize(
    gate_up: Tensor,
    outlier_rule: str,
    outlier_threshold: float,
    hot_columns: Tensor | None = None,
    rotation: int = 0,
) -> QuantizedRows:
    """`silu_mul` and `quantize_rows` of its result in one pass; gate_up [T, 2 * I].

    The products are rounded to gate_up's dtype before they are quantized, as between the two ops.
    On CPU the result is that of the two ops, bit for bit. Arguments and errors as there.
    """
    if _silu_mul_quantize is not None and _has_kernels(gate_up):
        return QuantizedRows(
            *_silu_mul_quantize(
                gate_up.contiguous(),
                rule_index(outlier_rule, outlier_threshold),
                outlier_threshold,
                hot_columns,
                rotation,
            )
        )
    return quantize_rows(silu_mul(gate_up), outlier_rule, outlier_threshold, hot_columns, rotation)


def activation_quantize(
    x: Tensor,
    activation: str,
    outlier_rule: str,
    outlier_threshold: float,
    hot_columns: Tensor | None = None,
    rotation: int = 0,
) -> QuantizedRows:
    """One of `activations.ACTIVATIONS` and `quantize_rows` of its result in one pass; x [T, K].

    The activation is rounded to x's dtype before it is quantized, as between the two. On CPU the
    result is that of the two, bit for bit; on a GPU the activation is computed in fp32 and rounded
    once. Raises ValueError for an unknown activation; else as `quantize_rows`.
    """
    index = _ACTIVATIONS.get(activation)
    if index is None:
        raise ValueError(
            f"activation_quantize: activation must be one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}; choose one of them"
        )
    if _activation_quantize is not None and _has_kernels(x):
        return QuantizedRows(
            *_activation_quantize(
                x.contiguous(),
                index,
                rule_index(outlier_rule, outlier_threshold),
                outlier_threshold,
                hot_columns,
                rotation,
            )
        )
    return quantize_rows(
        ACTIVATIONS[activation](x), outlier_rule, outlier_threshold, hot_columns, rotation
    )


def _has_kernels(x: Tensor) -> bool:
    """Whether the ops over rows are compiled for the device of x (given a library)."""
    return x.is_cpu or (_ON_CUDA and x.is_cuda)


def norm_kind_index(op: str, kind: str) -> int:
    """Returns norm_kind of the compiled ops; ValueError for an unknown one."""
    norm_kind = _KINDS.get(kind)
    if norm_kind is None:
        raise ValueError(f"{op}: kind must be 'rms' or 'layer', got {kind!r}; choose one of them")
    return norm_kind


def rule_index(outlier_rule: str, outlier_threshold: float) -> int:
    """Returns outlier_rule of the compiled ops; ValueError for an unknown one."""
    index = _RULES.get(outlier_rule)
    if index is None:
        checks.check_outlier_rule(outlier_rule, outlier_threshold)
        raise AssertionError("check_outlier_rule accepts only the rules of OUTLIER_RULES")
    return index


if _activation_quantize is not None:

    @torch.library.impl("dist_int8::activation_quantize", "CPU")
    def _activation_quantize_on_cpu(
        x: Tensor,
        activation: int,
        outlier_rule: int,
        outlier_threshold: float,
        hot_columns: Tensor | None,
        rotation: int = 0,
    ) -> list[Tensor]:
        """Runs torch's own activation, as a model on CPUs does: the result has to equal that."""
        if not 0 <= activation < len(ACTIVATIONS):
            raise ValueError(
                f"activation_quantize: activation must be 0 to {len(ACTIVATIONS) - 1}, got "
                f"{activation}; call it through dist_int8.int8.ops"
            )
        activated = list(ACTIVATIONS.values())[activation](x)
        assert _quantize_rows is not None
        return _quantize_rows(activated, outlier_rule, outlier_threshold, hot_columns, rotation)
