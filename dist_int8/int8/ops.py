"""The ops of a decoder block: compiled where the library has a kernel, else plain torch.

M or T rows are tokens, flattened: there is no batch dimension. On CPU every result of the compiled
ops is a function of its own row alone (of its own sequence, for `attention`), bit for bit: sums run
in an order that does not depend on M, on tiling or on threads.
"""

import torch
from torch import Tensor

from dist_int8.int8 import plain, reference
from dist_int8.int8.activations import ACTIVATIONS
from dist_int8.int8.library import library_info, load
from dist_int8.int8.reference import QuantizedRows
from dist_int8.int8.registry import has_kernel, has_op

__all__ = [
    "QuantizedRows",
    "activation_quantize",
    "add_norm",
    "add_norm_quantize",
    "attention",
    "decode_segments",
    "int8_linear",
    "int8_matmul",
    "int8_weight_linear",
    "library_info",
    "linear",
    "quantize_rows",
    "silu_mul",
    "silu_mul_quantize",
]

_COMPILED = load()
# The compiled ops, resolved once. They are called only where _COMPILED says that they exist.
_ops = torch.ops.dist_int8
_quantize_rows = _ops.quantize_rows.default if _COMPILED else None
_int8_linear = _ops.int8_linear.default if _COMPILED else None
_linear = _ops.linear.default if _COMPILED else None
_add_norm = _ops.add_norm.default if _COMPILED else None
_norm = _ops.norm.default if _COMPILED else None
_silu_mul = _ops.silu_mul.default if _COMPILED else None
_attention = _ops.attention.default if _COMPILED else None
_int8_matmul = _ops.int8_matmul.default if has_op("int8_matmul") else None
_int8_weight_linear = _ops.int8_weight_linear.default if has_op("int8_weight_linear") else None
_add_norm_quantize = _ops.add_norm_quantize.default if has_op("add_norm_quantize") else None
_silu_mul_quantize = _ops.silu_mul_quantize.default if has_op("silu_mul_quantize") else None
_activation_quantize = _ops.activation_quantize.default if has_op("activation_quantize") else None
# The ops over rows have CUDA kernels where the library was built with nvcc.
_ON_CUDA = has_kernel("quantize_rows", "CUDA")
_ATTENDS_ON_CUDA = has_kernel("attention", "CUDA")
_CUDA_HEAD_DIM = 256  # the largest D of the CUDA kernel
_MATMUL_ON_CUDA = has_kernel("int8_matmul", "CUDA")

_RULES = {rule: index for index, rule in enumerate(reference.OUTLIER_RULES)}
_KINDS = {"rms": 0, "layer": 1}
_ACTIVATIONS = {name: index for index, name in enumerate(ACTIVATIONS)}


def quantize_rows(
    x: Tensor, outlier_rule: str, outlier_threshold: float, hot_columns: Tensor | None = None
) -> QuantizedRows:
    """x [M, K] (fp32, bf16, fp16) -> its planes, scales, flags of outlier tiles and hot columns.

    x ~= row_scale * (x_int8 + 128 * x_high); see `reference.quantize_rows`, which this equals bit
    for bit. hot_columns: int32 [H] in 0..K-1 (on a GPU the range is not checked: it would take a
    host read). Raises ValueError for shapes, dtypes and rules, and for K > 131072.
    """
    if _quantize_rows is not None and _has_kernels(x):
        return QuantizedRows(
            *_quantize_rows(
                x.contiguous(),
                rule_index(outlier_rule, outlier_threshold),
                outlier_threshold,
                hot_columns,
            )
        )
    return reference.quantize_rows(x, outlier_rule, outlier_threshold, hot_columns)


def int8_linear(
    x: Tensor,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None = None,
    *,
    outlier_rule: str,
    outlier_threshold: float,
    hot_columns: Tensor | None = None,
    hot_weight: Tensor | None = None,
) -> Tensor:
    """x [..., K] (fp32, bf16, fp16), weight_int8 [N, K], col_scale fp32 [N] -> [..., N] like x.

    bias [N]; hot_columns int32 [H] with hot_weight [N, H], floating. The sum over k is an exact
    integer; see `reference.int8_linear`. On CPU equal to it bit for bit without hot columns, whose
    products are summed in fp32; on a GPU see `int8_matmul`. Raises ValueError for shapes, dtypes,
    rules, and K > 131072.
    """
    if x.dim() != 2:
        rows = int8_linear(
            x.reshape(-1, x.shape[-1]),
            weight_int8,
            col_scale,
            bias,
            outlier_rule=outlier_rule,
            outlier_threshold=outlier_threshold,
            hot_columns=hot_columns,
            hot_weight=hot_weight,
        )
        return rows.reshape(*x.shape[:-1], weight_int8.shape[0])
    if _int8_linear is not None and (x.is_cpu or (_MATMUL_ON_CUDA and x.is_cuda)):
        return _int8_linear(
            x.contiguous(),
            weight_int8,
            col_scale,
            bias,
            rule_index(outlier_rule, outlier_threshold),
            outlier_threshold,
            hot_columns,
            hot_weight,
        )
    return reference.int8_linear(
        x,
        weight_int8,
        col_scale,
        bias,
        outlier_rule=outlier_rule,
        outlier_threshold=outlier_threshold,
        hot_columns=hot_columns,
        hot_weight=hot_weight,
    )


def int8_matmul(
    rows: QuantizedRows,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None = None,
    *,
    hot_weight: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`int8_linear` of rows that are quantized already: rows of M, weight_int8 [N, K] -> [M, N].

    The result and residual [M, N] (added last, in fp32) have the dtype of rows.x_hot; hot_weight
    [N, H] belongs to its columns. See `reference.int8_matmul`, which this equals on CPU as
    `int8_linear` does. On a GPU the kernels for few rows equal it likewise; where a row count picks
    a CUTLASS kernel (gemm_tiles.h in csrc), outliers, hot columns, bias and residual are rounded
    to the result's dtype once before they meet the product of x_int8, as a layer in 16 bits rounds
    before its residual is added. Raises ValueError for shapes, dtypes, and K > 131072.
    """
    on = rows.x_int8
    if _int8_matmul is not None and (on.is_cpu or (_MATMUL_ON_CUDA and on.is_cuda)):
        return _int8_matmul(*rows, weight_int8, col_scale, bias, hot_weight, residual)
    return reference.int8_matmul(
        rows, weight_int8, col_scale, bias, hot_weight=hot_weight, residual=residual
    )


def int8_weight_linear(
    x: Tensor,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [M, K], weight_int8 [N, K], col_scale fp32 [N] -> [M, N] in x's dtype; x is not quantized.

    bias [N], residual [M, N] in x's dtype. Most exact, and on a GPU no slower than `int8_linear`
    where reading the weights is what takes time; meant for M up to 32 and bf16 or fp16 there. See
    `reference.int8_weight_linear`; it runs where no kernel is compiled, on CPUs always. Raises
    ValueError for shapes and dtypes.
    """
    if _int8_weight_linear is not None and (x.is_cpu or (_MATMUL_ON_CUDA and x.is_cuda)):
        return _int8_weight_linear(x.contiguous(), weight_int8, col_scale, bias, residual)
    return reference.int8_weight_linear(x, weight_int8, col_scale, bias, residual)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] or None -> [..., N] in x's dtype, summed in fp32.

    Each of them is fp32, bf16 or fp16; weight may be narrower than x and is widened without loss as
    it is read (a head in its checkpoint's dtype is half the bytes). Raises ValueError for shapes
    and dtypes.
    """
    if x.dim() != 2:
        rows = linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return rows.reshape(*x.shape[:-1], weight.shape[0])
    if _linear is not None and x.is_cpu:
        return _linear(x.contiguous(), weight, bias)
    return plain.linear(x, weight, bias)


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
        )
        return QuantizedRows(*rows), x if residual is None else total
    normed, total = add_norm(x, residual, weight, bias, eps, kind)
    return quantize_rows(normed, outlier_rule, outlier_threshold, hot_columns), total


def silu_mul_quantize(
    gate_up: Tensor, outlier_rule: str, outlier_threshold: float, hot_columns: Tensor | None = None
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
            )
        )
    return quantize_rows(silu_mul(gate_up), outlier_rule, outlier_threshold, hot_columns)


def activation_quantize(
    x: Tensor,
    activation: str,
    outlier_rule: str,
    outlier_threshold: float,
    hot_columns: Tensor | None = None,
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
            )
        )
    return quantize_rows(ACTIVATIONS[activation](x), outlier_rule, outlier_threshold, hot_columns)


def attention(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    segments: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Causal attention of T new tokens; their keys and values first go to the caches, in place.

    qkv [T, (H + 2 * KV) * D]: all query heads, all key heads, all value heads. key_cache
    [S, KV, D, L] and value_cache [S, KV, L, D] in qkv's dtype: S slots of L tokens; keys lie
    transposed. segments int32 [B, 3] on the CPU, rows (slot, start, count): the next `count` rows
    of qkv are the tokens at positions start.. of that slot. `decode_segments` takes them to a GPU
    once for many calls where every count is 1. cos, sin fp32 [P, R/2]: rotary
    embedding of the first R of D dimensions, halves paired ("rotate_half"; Su et al. 2021), row =
    position.
    alibi_slopes fp32 [H]: adds slope * key position (Press et al. 2022, up to a constant of the
    row). window: a token sees that many positions, its own included; 0 sees all before it. Softmax
    in fp32 of scale * q . k. -> [T, H * D] in qkv's dtype.

    Raises ValueError, before anything is written, for shapes and dtypes, for a slot or a position
    outside the caches or the tables, and where segments do not add up to T. Segments on a GPU are
    not read by the host: one that is not valid there gives NaN and leaves the caches alone.
    """
    if qkv.is_cuda:
        segments = decode_segments(segments, key_cache, cos)
    if _attention is not None and (
        (qkv.is_cpu and qkv.dtype == torch.float32) or (qkv.is_cuda and segments.is_cuda)
    ):
        return _attention(
            qkv.contiguous(),
            key_cache,
            value_cache,
            segments,
            num_heads,
            num_kv_heads,
            scale,
            cos,
            sin,
            alibi_slopes,
            window,
        )
    return plain.attention(
        qkv,
        key_cache,
        value_cache,
        segments,
        num_heads,
        num_kv_heads,
        scale,
        cos,
        sin,
        alibi_slopes,
        window,
    )


def decode_segments(segments: Tensor, key_cache: Tensor, cos: Tensor | None = None) -> Tensor:
    """The segments of `attention`, on the caches' GPU if its kernel takes them, else as they are.

    It takes int32 [B, 3] with every count 1: one new token a sequence. The copy does not wait.
    Raises ValueError for a slot or a position outside the caches or the tables.
    """
    if (
        segments.is_cuda
        or not key_cache.is_cuda
        or not _ATTENDS_ON_CUDA
        or key_cache.shape[2] > _CUDA_HEAD_DIM
        or not bool((segments[:, 2] == 1).all())
    ):
        return segments
    plain.check_segments(segments.tolist(), key_cache, cos)
    return segments.pin_memory().to(key_cache.device, non_blocking=True)


def _has_kernels(x: Tensor) -> bool:
    """Whether the ops over rows are compiled for the device of x (given a library)."""
    return x.is_cpu or (_ON_CUDA and x.is_cuda)


def norm_kind_index(op: str, kind: str) -> int:
    """norm_kind of the compiled ops."""
    norm_kind = _KINDS.get(kind)
    if norm_kind is None:
        raise ValueError(f"{op}: kind must be 'rms' or 'layer', got {kind!r}; choose one of them")
    return norm_kind


def rule_index(outlier_rule: str, outlier_threshold: float) -> int:
    """outlier_rule of the compiled ops; ValueError for an unknown one."""
    index = _RULES.get(outlier_rule)
    if index is None:
        reference.check_outlier_rule(outlier_rule, outlier_threshold)
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
    ) -> list[Tensor]:
        """In Python: on CPU a model runs torch's own activations, and this has to equal them."""
        if not 0 <= activation < len(ACTIVATIONS):
            raise ValueError(
                f"activation_quantize: activation must be 0 to {len(ACTIVATIONS) - 1}, got "
                f"{activation}; call it through dist_int8.int8.ops"
            )
        activated = list(ACTIVATIONS.values())[activation](x)
        assert _quantize_rows is not None
        return _quantize_rows(activated, outlier_rule, outlier_threshold, hot_columns)


if _int8_weight_linear is not None:
    # No compiled kernel: quantizing rows costs a CPU less than widening weights.
    torch.library.impl("dist_int8::int8_weight_linear", "CPU")(reference.int8_weight_linear)
