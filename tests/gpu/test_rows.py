"""Ops over rows on a GPU: the planes of their CPU twins, norms and activations within rounding."""

import pytest
import torch

from dist_int8.int8 import checks, ops, reference
from dist_int8.int8.activations import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 64), (1, 576), (3, 577), (37, 4096), (5, 14336), (129, 1000), (2, 57344)]
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_same_rows(got, want):
    """Planes, scales, flags and hot columns, bit for bit."""
    for name in reference.QuantizedRows._fields:
        mine, theirs = getattr(got, name).cpu(), getattr(want, name)
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_rows_are_near(got, values, dtype, rounding=0.0):
    """What the planes stand for is `values` [M, K] fp64, within rounding and half a step.

    rounding: what computing the values may add to the error of each before the cast to dtype.
    """
    planes = got.x_int8.cpu().double()
    if len(got.x_high):
        planes = planes + 128 * got.x_high.cpu().double()
    scale = got.row_scale.cpu().double()[:, None]
    error = (planes * scale - values).abs()
    subnormal = 6e-8 if dtype == torch.float16 else 0.0  # the step of the smallest numbers
    bound = 0.501 * scale + 2 * EPSILON[dtype] * values.abs() + subnormal + rounding + 1e-30
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("hot", [False, True], ids=["no-hot", "hot"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", checks.OUTLIER_RULES)
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_quantize_rows_equals_the_cpu(device, rows_with_outliers, dtype, rule, M, K, hot):
    x = rows_with_outliers(M, K, dtype)
    columns = torch.arange(0, K, 37, dtype=torch.int32)[:16] if hot else None
    on_device = None if columns is None else columns.to(device)
    got = ops.quantize_rows(x.to(device), rule, 6.0, on_device)
    assert_same_rows(got, ops.quantize_rows(x, rule, 6.0, columns))
    assert_same_rows(got, reference.quantize_rows(x, rule, 6.0, columns))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", [2, 8, 16, 32, 64, 256, 512, 1024])
@pytest.mark.parametrize(("M", "K"), [(1, 64), (3, 577), (37, 4096), (5, 14336), (2, 57344)])
def test_rotated_rows_equal_the_cpu(device, rows_with_outliers, dtype, rotation, M, K):
    x = rows_with_outliers(M, K, dtype)
    columns = torch.arange(0, K, 37, dtype=torch.int32)[:16]
    for rule in (("none", 0.0), ("row_rms", 4.0)):
        got = ops.quantize_rows(x.to(device), *rule, columns.to(device), rotation)
        assert_same_rows(got, ops.quantize_rows(x, *rule, columns, rotation))
        assert_same_rows(got, reference.quantize_rows(x, *rule, columns, rotation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", [64, 1024])
@pytest.mark.parametrize("K", [576, 4096, 28672])
def test_fused_ops_rotate_what_they_compute(device, rows_with_outliers, dtype, rotation, K):
    """Bit for bit what `quantize_rows` makes of their floating results on the same device."""
    x = rows_with_outliers(5, K, dtype).to(device)
    weight = torch.randn(K, generator=torch.Generator().manual_seed(2)).to(dtype).to(device)
    columns = torch.arange(0, K, 37, dtype=torch.int32)[:16].to(device)
    settings = ("none", 0.0, columns, rotation)
    every = torch.arange(K, dtype=torch.int32).to(device)  # x_hot of all is the activation itself

    fused, total = ops.add_norm_quantize(x, x, weight, None, 1e-5, "rms", *settings)
    normed, _ = ops.add_norm(x, x, weight, None, 1e-5, "rms")
    pairs = [(fused, normed)]
    assert torch.equal(total, x + x)
    gate_up = torch.cat([x, x.flip(1)], dim=1)
    pairs.append((ops.silu_mul_quantize(gate_up, *settings), ops.silu_mul(gate_up)))
    activated = ops.activation_quantize(x, "gelu", "none", 0.0, every).x_hot
    pairs.append((ops.activation_quantize(x, "gelu", *settings), activated))
    for got, values in pairs:
        assert_same_rows(
            got, reference.quantize_rows(values.cpu(), *settings[:2], columns.cpu(), rotation)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_rows(device, rows_with_outliers, dtype):
    x = rows_with_outliers(6, 256, dtype)
    x[1, 5], x[3, 255] = float("nan"), float("-inf")
    got = ops.quantize_rows(x.to(device), "row_rms", 4.0)
    assert_same_rows(got, ops.quantize_rows(x, "row_rms", 4.0))
    assert got.row_scale.isnan().tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows_takes_an_unaligned_view(device, rows_with_outliers, dtype):
    x = rows_with_outliers(5, 1025, dtype)
    view = x.to(device).flatten()[1 : 1 + 4 * 1024].view(4, 1024)
    assert_same_rows(
        ops.quantize_rows(view, "row_rms", 4.0), ops.quantize_rows(view.cpu(), "row_rms", 4.0)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_norms_match_the_cpu_with_and_without_quantization(
    device, rows_with_outliers, dtype, kind, with_residual, M, K
):
    x = rows_with_outliers(M, K, dtype)
    residual = rows_with_outliers(M, K, dtype, seed=1) if with_residual else None
    weight = torch.randn(K, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(K, generator=torch.Generator().manual_seed(3)).to(dtype)
    bias = bias if kind == "layer" else None

    def to(tensor):
        return None if tensor is None else tensor.to(device)

    arguments = (to(x), to(residual), to(weight), to(bias), 1e-5, kind)
    normed, total = ops.add_norm(*arguments)
    want_total = x if residual is None else x + residual
    torch.testing.assert_close(total.cpu(), want_total, rtol=0, atol=0)
    values = want_total.double()
    if kind == "layer":
        values = values - values.mean(dim=1, keepdim=True)
    values = values / (values.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * weight.double()
    values = values if bias is None else values + bias.double()
    tolerance = {"rtol": EPSILON[dtype], "atol": EPSILON[dtype] * float(values.abs().max())}
    torch.testing.assert_close(normed.cpu().double(), values, **tolerance)

    rows, fused_total = ops.add_norm_quantize(*arguments, "row_rms", 4.0)
    torch.testing.assert_close(fused_total.cpu(), want_total, rtol=0, atol=0)
    assert_rows_are_near(rows, values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K"), [(1, 64), (7, 1001), (33, 14336)])
@pytest.mark.parametrize("name", ["silu_mul", *ACTIVATIONS])
def test_quantized_activations_match_the_cpu(device, rows_with_outliers, dtype, M, K, name):
    x = rows_with_outliers(M, 2 * K if name == "silu_mul" else K, dtype)
    if name == "silu_mul":
        gate, up = x.double().chunk(2, dim=1)
        values = gate * torch.sigmoid(gate) * up
        product = ops.silu_mul(x.to(device))
        tolerance = {"rtol": 2 * EPSILON[dtype], "atol": 1e-6}
        torch.testing.assert_close(product.cpu().double(), values, **tolerance)
        rows = ops.silu_mul_quantize(x.to(device), "row_rms", 4.0)
    else:
        values = ACTIVATIONS[name](x.double())
        rows = ops.activation_quantize(x.to(device), name, "row_rms", 4.0)
    # 1 + tanh cancels for negative x; on a GPU all is fp32, on the CPU every step is in dtype
    steps = EPSILON[torch.float32 if device.type == "cuda" else dtype]
    inputs = x.double().abs()
    rounding = steps * (inputs if name != "silu_mul" else inputs.chunk(2, dim=1)[1])
    assert_rows_are_near(rows, values, dtype, rounding)
