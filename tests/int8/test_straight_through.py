"""The gradient of `Int8Linear`: that of a frozen linear layer with the dequantized weight."""

import pytest
import torch
from torch import nn

from dist_int8.int8 import matmul, ops
from dist_int8.int8.linear import Int8Linear

HOT = [3, 17, 40, 41]


def a_layer(dtype=torch.float32, hot=None) -> Int8Linear:
    torch.manual_seed(0)
    return Int8Linear.from_linear(nn.Linear(96, 56, dtype=dtype), hot_columns=hot)


def frozen(layer: Int8Linear, dtype=torch.float32) -> nn.Linear:
    linear = nn.Linear(96, 56, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(layer.dequantize(dtype))
    linear.bias.copy_(layer.bias)
    return linear


def some_x(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, 96, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("hot", [None, HOT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_that_of_the_dequantized_linear(dtype, hot, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(matmul, "_int8_linear", None)
    layer, x = a_layer(dtype, hot), some_x(dtype)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(y, layer(x))  # recording it changes no bit
    grad_y = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad_y)
    (theirs,) = torch.autograd.grad(frozen(layer, dtype)(x), x, grad_y)
    assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_gradient_of_gradient_is_that_of_the_dequantized_linear():
    layer, x = a_layer(), some_x()

    def second(module):
        (first,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    ours, theirs = second(layer), second(frozen(layer))
    assert (ours - theirs).norm() / theirs.norm() < 0.02  # the two differ in y


def test_gradient_of_the_bias():
    layer, x = a_layer(), some_x().detach()
    layer.bias.requires_grad_(True)
    layer(x).square().sum().backward()
    assert torch.allclose(layer.bias.grad, 2 * layer(x).detach().sum((0, 1)), rtol=1e-5)


def test_adapters_below_and_above_learn_as_with_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    x, below, above = torch.randn(4, 256), nn.Linear(256, 256), nn.Linear(128, 8)
    linear = nn.Linear(256, 128).requires_grad_(False)

    def gradients(layer):
        loss = above(layer(below(x))).square().sum()
        return torch.autograd.grad(loss, [below.weight, above.weight])

    theirs = bitsandbytes.nn.Linear8bitLt(256, 128, has_fp16_weights=False)
    theirs.load_state_dict(linear.state_dict())
    exact, others = gradients(linear), gradients(theirs.to("cpu"))
    # On a CPU bitsandbytes does not round x. Where we hardly do ("all"), the two are as exact.
    for rule, times in (("all", 1.05), ("absolute", 3.0)):
        ours = gradients(Int8Linear.from_linear(linear, outlier_rule=rule))
        for mine, other, right in zip(ours, others, exact, strict=True):
            assert (mine - right).norm() <= times * (other - right).norm()


def test_nothing_is_saved_but_the_int8_weight():
    layer, x = a_layer(hot=HOT), some_x()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    known = {layer.get_buffer(name).data_ptr() for name in layer.state_dict()}
    assert {tensor.data_ptr() for tensor in saved} <= known


def test_gradient_under_autocast_is_in_the_dtype_of_x():
    layer, x = a_layer(), some_x()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(layer(x).sum(), x)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_compiled_and_functional_gradients_are_the_same():
    layer, x = a_layer(hot=HOT), some_x()

    def loss(module):
        return lambda x: module(x).square().sum()

    (expected,) = torch.autograd.grad(loss(layer)(x), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(loss(compiled)(x), x)[0], expected)
    assert torch.equal(torch.func.grad(loss(layer))(x.detach()), expected)
    rows = torch.func.vmap(torch.func.grad(loss(layer)))(x.detach())
    assert torch.allclose(rows, expected, rtol=1e-5, atol=1e-6)


def test_forward_mode_is_refused():
    layer, x = a_layer(), some_x().detach()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(layer, (x,), (x,))


@pytest.mark.parametrize("name", ["col_scale", "hot_weight"])
def test_weights_that_should_train_are_refused(name):
    layer = a_layer(hot=HOT)
    layer.get_buffer(name).requires_grad_(True)
    with pytest.raises(RuntimeError, match=f"no gradient of {name}, .* train an adapter"):
        layer(some_x().detach())
    with torch.no_grad():
        layer(some_x())


def test_quantized_rows_have_no_gradient():
    layer, x = a_layer(), some_x()[0]
    with pytest.raises(RuntimeError, match=r"quantize_rows has no gradient, .* torch\.no_grad\(\)"):
        ops.quantize_rows(x, *layer.quantization)
