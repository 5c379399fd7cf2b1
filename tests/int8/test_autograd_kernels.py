"""Ops without a gradient refuse an input that requires one, compiled or not."""

import pytest
import torch

from dist_int8.int8 import ops, paper_methods, reference
from dist_int8.int8.registry import OPS, has_op


def a_call(name: str) -> tuple[torch.Tensor, tuple]:
    """Arguments of a raw op, the first floating one of which is to require grad."""
    x = torch.randn(2, 64)
    weight, scale = reference.quantize_weight(torch.randn(64, 64))
    rows = reference.quantize_rows(x, "none", 0.0)
    norm, segments = torch.ones(64), torch.tensor([[0, 0, 2]], dtype=torch.int32)
    heads = (1, 1, 1.0, None, None, None, 0)
    qkv, keys, values = torch.randn(2, 48), torch.zeros(1, 1, 16, 4), torch.zeros(1, 1, 4, 16)
    scales = torch.zeros(1, 1, 4)
    with_scales = (qkv, keys, None, values, None)
    sampled = (torch.randn(1, 7), *torch.zeros(2, 1).int(), torch.ones(1, 8).double())
    calls = {
        "quantize_rows": (x, 0, 0.0, None),
        "int8_linear": (x, weight, scale, None, 0, 0.0, None, None),
        "int8_matmul": (*rows, weight, scale, None, None, x),
        "int8_weight_linear": (x, weight, scale, None, None),
        "linear": (x, torch.randn(8, 64), None),
        "add_norm": (x, x.clone(), norm, None, 1e-5, 0),
        "norm": (x, norm, None, 1e-5, 0),
        "silu_mul": (x,),
        "add_norm_quantize": (x, None, norm, None, 1e-5, 0, 0, 0.0, None),
        "silu_mul_quantize": (x, 0, 0.0, None),
        "activation_quantize": (x, 0, 0, 0.0, None),
        "attention": (qkv, keys, values, segments, *heads),
        "attention_quantize": (*with_scales, segments, *heads, 0, 0.0, None),
        "place_tokens": (*with_scales, segments.new_zeros(2, 3), *heads),
        "int8_kv_attention": (qkv, keys.char(), scales, values.char(), scales, segments, *heads),
        "sample_tokens": (*sampled, torch.zeros(1, dtype=torch.int64)),
        "penalize_logits": (*sampled, torch.zeros(1, 1).int()),
        "prepare_blocks": (x, 64, [norm], [], [], False, *heads, 1e-5, 0, 0, 0.0),
        "decoder_blocks": (x, None, segments, torch.zeros(8, dtype=torch.uint8)),
    }
    arguments = calls[name]
    return next(t for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point()), (
        arguments
    )


@pytest.mark.parametrize("name", [name for name in OPS if name != "transform_layout"])
def test_a_raw_op_refuses_what_requires_grad(name):
    assert ops.library_info()["path"] and has_op(name)
    op = getattr(torch.ops.dist_int8, name)
    x, arguments = a_call(name)
    is_whole = not name.endswith("_blocks")  # those calls have no block
    if is_whole:
        op(*arguments)
    x.requires_grad_(True)
    with pytest.raises(RuntimeError, match=f"{name} has no gradient, but one of its inputs"):
        op(*arguments)
    if is_whole:
        with torch.no_grad():
            op(*arguments)


def test_a_list_of_tensors_is_looked_through():
    _, arguments = a_call("prepare_blocks")
    arguments[2][0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="prepare_blocks has no gradient"):
        torch.ops.dist_int8.prepare_blocks(*arguments)


def specifications() -> dict[str, tuple]:
    weight, scale = reference.quantize_weight(torch.randn(8, 64))
    settings = {"outlier_rule": "none", "outlier_threshold": 0.0}
    papers = [
        paper_methods.absmax_linear,
        paper_methods.row_wise_linear,
        paper_methods.vector_wise_linear,
        paper_methods.zeropoint_linear,
        paper_methods.llm_int8_linear,
    ]
    return {
        "quantize_rows": lambda x: reference.quantize_rows(x, "none", 0.0),
        "int8_linear": lambda x: reference.int8_linear(x, weight, scale, **settings),
        **{method.__name__: lambda x, m=method: m(x, torch.randn(8, 64)) for method in papers},
    }


@pytest.mark.parametrize("name", specifications())
def test_plain_torch_refuses_it_too(name):
    function = specifications()[name]
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradient, but one of its inputs"):
        function(x)
    with torch.inference_mode():
        function(x)
