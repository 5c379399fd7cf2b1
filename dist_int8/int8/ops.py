"""The ops of a decoder block: compiled where the library has a kernel, else plain torch.

M or T rows are tokens, flattened: there is no batch dimension. On a CPU every result of the
compiled ops is a function of its own row alone (of its own sequence, for `attention`), bit for bit:
sums run in an order that depends on neither M, tiling nor threads.

They are implemented by family, in `rows`, `matmul`, `attention` and `sampling`; models and the
sampler call them through here.
"""

from dist_int8.int8.attention import attention, attention_quantize, check_segments
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.library import library_info
from dist_int8.int8.matmul import int8_linear, int8_matmul, int8_weight_linear, linear
from dist_int8.int8.reference import QuantizedRows
from dist_int8.int8.rows import (
    activation_quantize,
    add_norm,
    add_norm_quantize,
    norm_kind_index,
    quantize_rows,
    rule_index,
    silu_mul,
    silu_mul_quantize,
)
from dist_int8.int8.sampling import penalize_logits, sample_tokens
from dist_int8.int8.segments import Segments

__all__ = [
    "AttentionArgs",
    "QuantizedRows",
    "Segments",
    "activation_quantize",
    "add_norm",
    "add_norm_quantize",
    "attention",
    "attention_quantize",
    "check_segments",
    "int8_linear",
    "int8_matmul",
    "int8_weight_linear",
    "library_info",
    "linear",
    "norm_kind_index",
    "penalize_logits",
    "quantize_rows",
    "rule_index",
    "sample_tokens",
    "silu_mul",
    "silu_mul_quantize",
]
