"""The ops of the compiled library by name, and which of them torch knows."""

import torch

OPS = (
    "quantize_rows",
    "int8_linear",
    "int8_matmul",
    "int8_weight_linear",
    "linear",
    "add_norm",
    "norm",
    "silu_mul",
    "add_norm_quantize",
    "silu_mul_quantize",
    "activation_quantize",
    "attention",
    "attention_quantize",
    "place_tokens",
    "int8_kv_attention",
    "prepare_blocks",
    "decoder_blocks",
    "sample_tokens",
    "penalize_logits",
    "transform_layout",
)


def has_op(name: str) -> bool:
    """Whether the loaded library knows op `name`, on any device."""
    return torch._C._dispatch_has_kernel(f"dist_int8::{name}")


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Whether op `name` has a kernel for "CPU" or "CUDA"; an older library may not know the op."""
    op = f"dist_int8::{name}"
    return has_op(name) and torch._C._dispatch_has_kernel_for_dispatch_key(op, dispatch_key)
