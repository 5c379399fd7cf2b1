"""int8_matmul: int8_linear in two steps, residual included; opcheck and torch.compile."""

import pytest
import torch

from dist_int8.int8 import ops, reference
from dist_int8.int8.registry import OPS, has_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = [("none", 0.0), ("absolute", 2.0), ("row_rms", 1.5), ("all", 0.0)]
SHAPES = [(1, 64, 8), (5, 100, 17), (37, 577, 50), (100, 4096, 21), (0, 8, 4), (3, 8, 0)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(M, K, N, dtype=torch.float32, num_hot=0):
    """x with outliers, and the layer that multiplies it: x, arguments of int8_matmul."""
    x = torch.randn(M, K)
    if M > 4:
        x[1], x[2, K // 2], x[3, :: max(1, K // 6)] = 0.0, 300.0, 40.0
    weight_int8, col_scale = reference.quantize_weight(torch.randn(N, K))
    hot_columns = torch.randperm(K)[:num_hot].int() if num_hot else None
    arguments = {
        "weight_int8": weight_int8,
        "col_scale": col_scale,
        "bias": torch.randn(N),
        "hot_weight": torch.randn(N, num_hot).to(dtype) if num_hot else None,
        "residual": torch.randn(M, N).to(dtype),
    }
    return x.to(dtype), hot_columns, arguments


@pytest.mark.parametrize(("rule", "threshold"), RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_specification_bit_for_bit(rule, threshold, dtype):
    for M, K, N in SHAPES:
        x, _, arguments = layer(M, K, N, dtype)
        rows = ops.quantize_rows(x, rule, threshold)
        for left_out in ({}, {"residual": None}, {"bias": None}, {"residual": None, "bias": None}):
            chosen = arguments | left_out
            got = ops.int8_matmul(rows, **chosen)
            want = reference.int8_matmul(rows, **chosen)
            assert got.dtype == dtype and got.shape == (M, N) and torch.equal(got, want)


@pytest.mark.parametrize(("rule", "threshold"), RULES)
@pytest.mark.parametrize("num_hot", [0, 1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_is_quantize_rows_and_int8_matmul(rule, threshold, num_hot, dtype):
    for M, K, N in [(9, 200, 13), (150, 640, 7)]:
        x, hot_columns, arguments = layer(M, K, N, dtype, num_hot)
        del arguments["residual"]
        settings = {"outlier_rule": rule, "outlier_threshold": threshold}
        whole = ops.int8_linear(x, **arguments, **settings, hot_columns=hot_columns)
        rows = ops.quantize_rows(x, rule, threshold, hot_columns)
        assert torch.equal(ops.int8_matmul(rows, **arguments), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hot_columns_and_residual(dtype):
    x, hot_columns, arguments = layer(9, 200, 13, dtype, 16)
    rows = ops.quantize_rows(x, "row_rms", 4.0, hot_columns)
    got = ops.int8_matmul(rows, **arguments)
    want = reference.int8_matmul(rows, **arguments)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=100 * tolerance)


def test_sums_beyond_int32_are_exact():
    x = torch.full((3, 4096), 3.0)
    weight = torch.full((5, 4096), -127, dtype=torch.int8)
    rows = ops.quantize_rows(x, "all", 0.0)
    got = ops.int8_matmul(rows, weight, torch.ones(5))
    assert torch.equal(got, reference.int8_matmul(rows, weight, torch.ones(5)))


def test_a_row_that_is_not_finite_is_nan_alone():
    x, _, arguments = layer(6, 70, 5)
    x[2, 3] = float("inf")
    got = ops.int8_matmul(ops.quantize_rows(x, "absolute", 6.0), **arguments)
    assert got.isnan().all(dim=1).tolist() == [i == 2 for i in range(6)]


def test_rows_are_batch_invariant():
    x, hot_columns, arguments = layer(130, 577, 33, num_hot=16)
    rows = ops.quantize_rows(x, "row_rms", 3.0, hot_columns)
    whole = ops.int8_matmul(rows, **arguments)
    for part in (slice(0, 1), slice(2, 3), slice(17, 60)):
        some = ops.QuantizedRows(*(value[part] for value in rows))
        alone = ops.int8_matmul(some, **(arguments | {"residual": arguments["residual"][part]}))
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weight_linear_errs_by_the_weights_alone(dtype):
    x, _, arguments = layer(9, 200, 13, dtype)
    del arguments["hot_weight"]
    got = ops.int8_weight_linear(x, **arguments)
    weight = reference.dequantize_weight(arguments["weight_int8"], arguments["col_scale"]).double()
    want = x.double() @ weight.T + arguments["bias"].double() + arguments["residual"].double()
    tolerance = torch.finfo(dtype).eps
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), want, rtol=tolerance, atol=2e-7 * float(x.double().norm())
    )


@pytest.mark.parametrize("num_hot", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(num_hot, dtype):
    x, hot_columns, arguments = layer(5, 40, 6, dtype, num_hot)
    rows = ops.quantize_rows(x, "row_rms", 2.0, hot_columns)
    for residual in (arguments["residual"], None):
        last = (arguments["bias"], arguments["hot_weight"], residual)
        call = (*rows, arguments["weight_int8"], arguments["col_scale"], *last)
        torch.library.opcheck(torch.ops.dist_int8.int8_matmul.default, call)


def test_every_op_has_a_fake():
    for name in OPS:
        assert has_op(name), f"{name} is missing: the library is older than this source"
        entry = torch.library._library.simple_registry.singleton.find(f"dist_int8::{name}")
        assert entry.fake_impl.kernel is not None, name


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_block_of_fused_ops_compiles_without_graph_breaks(dynamic):
    K, N = 64, 96
    _, hot_columns, first = layer(5, K, 2 * N, num_hot=16)
    _, _, second = layer(5, N, K)
    norm, rule = torch.ones(K), ("row_rms", 3.0)

    def block(x, residual):
        rows, total = ops.add_norm_quantize(
            x, residual, norm, None, 1e-5, "rms", *rule, hot_columns
        )
        up = ops.int8_matmul(rows, **(first | {"residual": None}))
        gated = ops.silu_mul_quantize(up, *rule)
        return ops.int8_matmul(gated, **(second | {"residual": total}))

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for M in (5, 12, 1) if dynamic else (5,):
        x, residual = torch.randn(2, M, K)
        assert torch.equal(compiled(x, residual), block(x, residual))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_int8": torch.zeros(2, 40)}, "x_int8 must be int8, got float32"),
        ({"x_high": torch.zeros(2, 41, dtype=torch.int8)}, r"x_high must be \[M=2, K=40\], got"),
        ({"row_scale": torch.ones(3)}, r"row_scale must be \[M=2\], got \[3\]"),
        (
            {"high_tiles": torch.zeros(2, 2, dtype=torch.int32)},
            r"high_tiles must be \[M=2, ceil\(K/2048\)=1\], got \[2, 2\]",
        ),
        ({"x_hot": torch.zeros(2, 0).double()}, "x_hot must be float32, bfloat16 or float16"),
        ({"x_hot": torch.zeros(2, 3)}, r"hot_weight must be \[N, H=3\], got none"),
        ({"weight_int8": torch.zeros(6, 39, dtype=torch.int8)}, r"must be \[N, K=40\], got"),
        ({"col_scale": torch.ones(5)}, r"col_scale must be \[N=6\], got \[5\]"),
        ({"bias": torch.ones(7)}, r"bias must be \[N=6\], got \[7\]"),
        ({"hot_weight": torch.ones(6, 1)}, r"hot_weight must be \[N=6, H=0\], got \[6, 1\]"),
        ({"residual": torch.ones(2, 6).half()}, "residual must be float32, got float16"),
        ({"residual": torch.ones(6, 2).T}, "residual must be contiguous"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "x_int8": torch.zeros(2, 40, dtype=torch.int8),
        "x_high": torch.zeros(2, 40, dtype=torch.int8),
        "row_scale": torch.ones(2),
        "high_tiles": torch.zeros(2, 1, dtype=torch.int32),
        "x_hot": torch.zeros(2, 0),
        "weight_int8": torch.zeros(6, 40, dtype=torch.int8),
        "col_scale": torch.ones(6),
        "bias": None,
        "hot_weight": None,
        "residual": None,
    } | change
    rows = ops.QuantizedRows(*(arguments.pop(name) for name in ops.QuantizedRows._fields))
    with pytest.raises(ValueError, match=f"^int8_matmul: .*{message}"):
        ops.int8_matmul(rows, **arguments)
