"""Shapes and dtypes of every op's results, for torch.compile and meta tensors.

Imported by `library.load()` once the library is there: torch takes a fake only for an op that
exists.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.checks import OUTLIER_RULES
from dist_int8.int8.packing import count_outputs
from dist_int8.int8.registry import has_op

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # the fields of reference.QuantizedRows
_NONE, _ALL = OUTLIER_RULES.index("none"), OUTLIER_RULES.index("all")


def _fake(name: str) -> Callable[[Any], Any]:
    if not has_op(name):  # a library built from older sources
        return lambda function: function
    return torch.library.register_fake(f"dist_int8::{name}")


def _quantized(
    x: Tensor, num_features: int, rule: tuple[int, float], hot_columns: Tensor | None
) -> Rows:
    num_rows = x.shape[0]
    outlier_rule, outlier_threshold = rule
    decomposes = outlier_rule == _ALL or (outlier_rule != _NONE and outlier_threshold != 0)
    num_high = num_rows if decomposes else 0
    num_hot = 0 if hot_columns is None else hot_columns.shape[0]
    return (
        x.new_empty(num_rows, num_features, dtype=torch.int8),
        x.new_empty(num_high, num_features, dtype=torch.int8),
        x.new_empty(num_rows, dtype=torch.float32),
        x.new_empty(num_high, (num_features + 2047) // 2048, dtype=torch.int32),
        x.new_empty(num_rows, num_hot),
    )


@_fake("quantize_rows")
def _quantize_rows(
    x: Tensor,
    outlier_rule: int,
    outlier_threshold: float,
    hot_columns: Tensor | None,
    rotation: int = 0,
) -> Rows:
    return _quantized(x, x.shape[1], (outlier_rule, outlier_threshold), hot_columns)


@_fake("add_norm_quantize")
def _add_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm_kind: int,
    outlier_rule: int,
    outlier_threshold: float,
    hot_columns: Tensor | None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return total, *_quantized(x, x.shape[1], (outlier_rule, outlier_threshold), hot_columns)


@_fake("silu_mul_quantize")
def _silu_mul_quantize(
    gate_up: Tensor,
    outlier_rule: int,
    outlier_threshold: float,
    hot_columns: Tensor | None,
    rotation: int = 0,
) -> Rows:
    rule = (outlier_rule, outlier_threshold)
    return _quantized(gate_up, gate_up.shape[1] // 2, rule, hot_columns)


@_fake("activation_quantize")
def _activation_quantize(
    x: Tensor,
    activation: int,
    outlier_rule: int,
    outlier_threshold: float,
    hot_columns: Tensor | None,
    rotation: int = 0,
) -> Rows:
    return _quantized(x, x.shape[1], (outlier_rule, outlier_threshold), hot_columns)


@_fake("int8_linear")
def _int8_linear(
    x: Tensor,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None,
    outlier_rule: int,
    outlier_threshold: float,
    hot_columns: Tensor | None,
    hot_weight: Tensor | None,
    rotation: int = 0,
) -> Tensor:
    return x.new_empty(x.shape[0], count_outputs(weight_int8))


@_fake("int8_matmul")
def _int8_matmul(
    x_int8: Tensor,
    x_high: Tensor,
    row_scale: Tensor,
    high_tiles: Tensor,
    x_hot: Tensor,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None,
    hot_weight: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    return x_hot.new_empty(x_int8.shape[0], count_outputs(weight_int8))


@_fake("int8_weight_linear")
def _int8_weight_linear(
    x: Tensor,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], weight_int8.shape[0])


@_fake("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_fake("add_norm")
def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm_kind: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@_fake("norm")
def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm_kind: int) -> Tensor:
    return torch.empty_like(x)


@_fake("silu_mul")
def _silu_mul(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_fake("attention")
def _attention(
    qkv: Tensor, key_cache: Tensor, value_cache: Tensor, segments: Tensor, *args: Any
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], AttentionArgs(*args).num_heads * key_cache.shape[-2])


@_fake("attention_quantize")
def _attention_quantize(
    qkv: Tensor,
    key_cache: Tensor,
    key_scale: Tensor | None,
    value_cache: Tensor,
    value_scale: Tensor | None,
    segments: Tensor,
    *rest: Any,
) -> Rows:
    outlier_rule, outlier_threshold, hot_columns = rest[7:10]
    num_features = AttentionArgs(*rest[:7]).num_heads * key_cache.shape[-2]
    return _quantized(qkv, num_features, (outlier_rule, outlier_threshold), hot_columns)


@_fake("place_tokens")
def _place_tokens(qkv: Tensor, *_: object) -> None:
    pass


@_fake("int8_kv_attention")
def _int8_kv_attention(
    qkv: Tensor,
    key_cache: Tensor,
    key_scale: Tensor,
    value_cache: Tensor,
    value_scale: Tensor,
    segments: Tensor,
    *args: Any,
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], AttentionArgs(*args).num_heads * key_cache.shape[-2])


@_fake("prepare_blocks")
def _prepare_blocks(like: Tensor, *_: object) -> Tensor:
    return like.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@_fake("decoder_blocks")
def _decoder_blocks(x: Tensor, residual: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@_fake("sample_tokens")
def _sample_tokens(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@_fake("penalize_logits")
def _penalize_logits(logits: Tensor, *_: object) -> None:
    pass


@_fake("transform_layout")
def _transform_layout(x: Tensor, source: int, target: int, rows: int, cols: int) -> Tensor:
    tile_rows, tile_cols = ((1, 1), (1, 32), (8, 32), (32, 32))[target]
    return x.new_empty(-(-rows // tile_rows) * tile_rows, -(-cols // tile_cols) * tile_cols)
