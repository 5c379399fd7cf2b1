"""Each method's linear layer against the formula of its paper, written again in float64."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_int8.evaluation import linears
from dist_int8.evaluation.linears import Matrix
from dist_int8.int8 import paper_methods


@pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
def linear(request):
    torch.manual_seed(1)
    return nn.Linear(48, 20, bias=request.param).requires_grad_(False)


@pytest.fixture
def x():
    torch.manual_seed(2)
    x = torch.randn(2, 7, 48)
    x[..., 5] *= 20  # an outlier feature
    x[0, 3] = 0.0
    return x


def rounded(x, scale):
    """x / scale to the nearest integer, half to even, in float64 after a division in fp32."""
    return torch.where(scale > 0, x.float() / scale.float(), 0.0).round().double()


def absmax(x, dim=None):
    return (x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)) / 127


def expected(name, x, w, absmax_x):
    """y [M, N] in float64 of x [M, K] and w [N, K] fp32."""
    if name == "weights-only":
        s = absmax(w, 1)
        return x.double() @ (rounded(w, s) * s.double()).T
    if name == "absmax":
        s, t = absmax(x), absmax(w)
        return rounded(x, s) @ rounded(w, t).T * s.double() * t.double()
    if name == "row-wise":
        s, t = absmax(x, 1), absmax(w)
        return rounded(x, s) @ rounded(w, t).T * s.double() * t.double()
    if name == "vector-wise":
        s, t = absmax(x, 1), absmax(w, 1)
        return rounded(x, s) @ rounded(w, t).T * s.double() * t.double().T
    if name == "zeropoint":

        def shifted(m):
            step = (m.max() - m.min()) / 254
            zero = (m.min() / step).round() + 127
            q = ((m / step).round() - zero).clamp(-127, 127)
            return (q + zero).double() * step.double()

        return shifted(x) @ shifted(w).T
    if name == "llm.int8":
        hot = (x.abs() >= 6).any(0)
        rest = torch.where(hot, 0.0, x)
        s, t = absmax(rest, 1), absmax(w, 1)
        y = rounded(rest, s) @ rounded(w, t).T * s.double() * t.double().T
        return y + x[:, hot].double() @ w[:, hot].double().T
    assert name == "smoothquant"
    smooth = (absmax_x / w.abs().amax(0)).sqrt()
    return expected("vector-wise", x / smooth, w * smooth, None)


LAYERS = {
    "weights-only": linears.WeightsOnly,
    "absmax": linears.Absmax,
    "zeropoint": linears.ZeroPoint,
    "row-wise": linears.RowWise,
    "vector-wise": linears.VectorWise,
    "llm.int8": linears.LlmInt8,
    "smoothquant": linears.SmoothQuant,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_its_formula_in_float64(name, linear, x):
    absmax_x = torch.rand(48) + 1.0
    y = LAYERS[name](Matrix(linear, absmax_x))(x)
    right = expected(name, x.reshape(-1, 48), linear.weight, absmax_x)
    if linear.bias is not None:
        right = right + linear.bias.double()
    assert y.shape == (2, 7, 20) and y.dtype == x.dtype
    tolerance = 1e-5 * right.abs().max().item()
    if name == "smoothquant":  # sqrt and power may round apart, and move one rounding each
        tolerance *= 1000
    torch.testing.assert_close(y.reshape(-1, 20).double(), right, rtol=0, atol=tolerance)


def test_methods_match_the_reference_implementation(linear, x):
    rows, matrix = x.reshape(-1, 48), Matrix(linear)
    bias = 0.0 if linear.bias is None else linear.bias
    for ours, theirs in (
        (linears.Absmax, paper_methods.absmax_linear),
        (linears.RowWise, paper_methods.row_wise_linear),
        (linears.VectorWise, paper_methods.vector_wise_linear),
        (linears.ZeroPoint, paper_methods.zeropoint_linear),
    ):
        torch.testing.assert_close(
            ours(matrix)(rows), theirs(rows, linear.weight) + bias, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", LAYERS)
def test_zero_and_constant_weights(name):
    """Nothing to scale by: no NaN."""
    linear = nn.Linear(16, 4, bias=False).requires_grad_(False)
    linear.weight.fill_(0.5)
    layer = LAYERS[name](Matrix(linear, torch.ones(16)))
    assert torch.equal(layer(torch.zeros(3, 16)), torch.zeros(3, 4))
    torch.testing.assert_close(layer(torch.ones(3, 16)), torch.full((3, 4), 8.0), rtol=0.02, atol=0)


def test_outliers_hurt_naive_methods_and_not_llm_int8(x):
    linear = nn.Linear(48, 20, bias=False).requires_grad_(False)
    matrix, right = Matrix(linear), linear(x)

    def error(layer):
        return ((layer(matrix)(x) - right).norm() / right.norm()).item()

    assert error(linears.LlmInt8) < error(linears.VectorWise) < error(linears.Absmax)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_bitsandbytes_layer_matches_the_library(threshold, linear, x):
    pytest.importorskip("bitsandbytes")
    layer = linears.bitsandbytes_linear(Matrix(linear), threshold)
    assert type(layer).__name__ == "Linear8bitLt"
    y, right = layer(x), linear(x)
    assert 0 < (y - right).norm() / right.norm() < 0.1
    if threshold:
        rows = x.reshape(-1, 48)
        spec = paper_methods.llm_int8_linear(rows, linear.weight, 6.0, union_of_columns=True)
        spec = spec if linear.bias is None else spec + linear.bias
        torch.testing.assert_close(y.reshape(-1, 20), spec, rtol=0.02, atol=0.02)


def test_torchao_layer_has_one_scale_per_row(linear, x):
    pytest.importorskip("torchao")
    layer = linears.torchao_linear(Matrix(linear))
    near = linears.VectorWise(Matrix(linear))(x)
    torch.testing.assert_close(layer(x), near, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("K", [1, 1023, 1024, 1025, 3000])
def test_the_integer_product_is_exact_up_to_the_largest_values(K):
    x = torch.randint(-128, 128, (6, K), dtype=torch.int8)
    x[0] = -128  # squares of 2**14, the most that fp32 has to add up exactly
    weight = torch.randint(-128, 128, (5, K), dtype=torch.int8)
    weight[0] = -128
    product = linears.integer_product(x, weight)
    assert product.dtype == torch.int32
    assert torch.equal(product.double(), x.double() @ weight.double().t())


def test_bitsandbytes_is_imported_without_its_warnings(caplog):
    pytest.importorskip("bitsandbytes")
    assert linears.import_bitsandbytes().nn.Linear8bitLt
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community")
    assert not caplog.records


def test_nothing_else_imports_bitsandbytes():
    root = Path(__file__).parents[2]
    files = [*(root / "dist_int8").rglob("*.py"), *(root / "benchmarks").glob("*.py")]
    importing = {path.name for path in files if "import bitsandbytes\n" in path.read_text()}
    assert importing == {"linears.py"}
