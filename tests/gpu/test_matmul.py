"""int8_matmul and int8_linear on a GPU, every bucket of row counts and its edges."""

import pytest
import torch

from dist_int8.int8 import checks, ops, reference
from dist_int8.int8.linear import Int8Linear
from dist_int8.int8.reference import QuantizedRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = [1, 2, 4, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 600]
# Whole tiles, odd sizes, K that no vector divides, one long K.
SHAPES = [(256, 512), (1000, 1000), (33, 72), (65, 577), (128, 14336)]
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def small_planes(M, K, flagged, generator):
    """Planes whose sums stay below 2^24: fp32 results are the int32 sums themselves."""
    largest = 7 if K <= 4096 else 3
    low = torch.randint(-largest, largest + 1, (M, K), generator=generator, dtype=torch.int8)
    high = torch.zeros(M, K, dtype=torch.int8)
    if flagged == "some":
        high[:: max(1, M // 3), 5 :: max(6, K // 5)] = 1
    elif flagged == "all":
        high = torch.randint(-1, 2, (M, K), generator=generator, dtype=torch.int8)
    tiles = torch.zeros(M, (K + 2047) // 2048, dtype=torch.int64)
    for k in range(0, K, 64):
        bit = high[:, k : k + 64].ne(0).any(dim=1).long() << (k // 64 % 32)
        tiles[:, k // 2048] |= bit
    tiles = torch.where(tiles >= 2**31, tiles - 2**32, tiles).to(torch.int32)
    return low, high, tiles


@pytest.mark.parametrize("flagged", ["none", "some", "all"])
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("M", ROWS)
def test_integer_sums_are_exact(device, M, N, K, flagged):
    generator = torch.Generator().manual_seed(M + N + K)
    low, high, tiles = small_planes(M, K, flagged, generator)
    weight = torch.randint(-7, 8, (N, K), generator=generator, dtype=torch.int8)
    rows = QuantizedRows(low, high, torch.ones(M), tiles, torch.empty(M, 0))
    got = ops.int8_matmul(
        QuantizedRows(*(t.to(device) for t in rows)), weight.to(device), torch.ones(N).to(device)
    )
    want = reference.integer_product(low, high, weight)
    assert want.abs().max() < 2**24
    assert torch.equal(got.cpu().double(), want)


@pytest.mark.parametrize("num_hot", [0, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("M", [1, 5, 16, 17, 33, 129])
def test_fused_matmul_matches_the_specification(
    device, rows_with_outliers, dtype, M, N, K, num_hot
):
    x = rows_with_outliers(M, K, dtype)
    generator = torch.Generator().manual_seed(N)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    hot = torch.arange(num_hot, dtype=torch.int32) * (K // max(1, num_hot)) if num_hot else None
    hot_weight = None if hot is None else weight[:, hot.long()].to(dtype)
    weight_int8, col_scale = reference.quantize_weight(weight)
    bias = torch.randn(N, generator=generator).to(dtype)
    residual = torch.randn(M, N, generator=generator).to(dtype)
    rows = reference.quantize_rows(x, "row_rms", 4.0, hot)
    want = reference.int8_matmul(
        rows._replace(x_hot=rows.x_hot.float()),
        weight_int8,
        col_scale,
        bias,
        hot_weight=hot_weight,
        residual=residual,
    )
    got = ops.int8_matmul(
        QuantizedRows(*(t.to(device) for t in rows)),
        weight_int8.to(device),
        col_scale.to(device),
        bias.to(device),
        hot_weight=None if hot_weight is None else hot_weight.to(device),
        residual=residual.to(device),
    )
    assert got.dtype == dtype
    tolerance = TOLERANCES[dtype]
    scale = float(want.abs().max())
    torch.testing.assert_close(
        got.cpu().float(), want.float(), rtol=2 * tolerance, atol=tolerance * scale
    )


@pytest.mark.parametrize("parts", ["product", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(4096, 512), (4104, 1040), (4224, 64)])
@pytest.mark.parametrize("M", [513, 640, 1100])
def test_prefill_tile_matches_the_specification(device, rows_with_outliers, dtype, M, N, K, parts):
    """256 x 128 outputs per thread block on 9.0: more than 512 rows, at least 4096 outputs."""
    x = rows_with_outliers(M, K, dtype)
    generator = torch.Generator().manual_seed(N)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    weight_int8, col_scale = reference.quantize_weight(weight)
    bias = residual = hot = hot_weight = None
    rule = "none"
    if parts == "everything":
        rule = "row_rms"
        hot = torch.arange(16, dtype=torch.int32) * (K // 16)
        hot_weight = weight[:, hot.long()].to(dtype)
        bias = torch.randn(N, generator=generator).to(dtype)
        residual = torch.randn(M, N, generator=generator).to(dtype)
    rows = ops.quantize_rows(x, rule, 4.0, hot)
    arguments = (weight_int8, col_scale, bias)
    more = {"hot_weight": hot_weight, "residual": residual}

    def to(value):
        return None if value is None else value.to(device)

    got = ops.int8_matmul(
        QuantizedRows(*map(to, rows)),
        *map(to, arguments),
        **{name: to(value) for name, value in more.items()},
    )
    want = ops.int8_matmul(rows, *arguments, **more)  # the CPU's, which other tests hold to account
    assert got.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        got.cpu(), want, rtol=2 * tolerance, atol=tolerance * float(want.abs().max())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_hot", [0, 16, 64])
@pytest.mark.parametrize("rotation", [16, 64, 1024])
@pytest.mark.parametrize("M", [1, 17, 130, 640])
def test_rotated_linear_is_close_to_the_floating_product(
    device, rows_with_outliers, dtype, M, rotation, num_hot
):
    """One plane: the rotated product is that of x and the weight, within their rounding."""
    x = rows_with_outliers(M, 1024, dtype)
    generator = torch.Generator().manual_seed(1)
    layer = Int8Linear(
        *(1024, 512),
        bias=False,
        outlier_rule="none",
        outlier_threshold=0.0,
        hot_columns=list(range(0, 16 * num_hot, 16)) or None,
        rotation=rotation,
        dtype=dtype,
    ).quantize_((torch.randn(512, 1024, generator=generator) / 32).to(dtype))
    want = layer(x)  # the CPU's
    got = layer.to(device)(x.to(device)).cpu()
    tolerance = TOLERANCES[dtype] * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=2 * TOLERANCES[dtype], atol=tolerance)
    exact = x.double() @ layer.cpu().weight.double().T
    assert (want.double() - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", checks.OUTLIER_RULES)
@pytest.mark.parametrize("M", [1, 17, 130])
def test_int8_linear_is_close_to_the_cpu(device, rows_with_outliers, dtype, rule, M):
    x = rows_with_outliers(M, 1024, dtype)
    weight = torch.randn(768, 1024, generator=torch.Generator().manual_seed(1)) / 32
    weight_int8, col_scale = reference.quantize_weight(weight)
    settings = {"outlier_rule": rule, "outlier_threshold": 6.0}
    got = ops.int8_linear(x.to(device), weight_int8.to(device), col_scale.to(device), **settings)
    want = ops.int8_linear(x, weight_int8, col_scale, **settings)
    tolerance = TOLERANCES[dtype] * float(want.abs().max())
    torch.testing.assert_close(got.cpu(), want, rtol=2 * TOLERANCES[dtype], atol=tolerance)


@pytest.mark.parametrize("M", [1, 8, 17, 32])
def test_int8_linear_is_batch_invariant(device, rows_with_outliers, M):
    """Bit for bit, in the kernel of few rows, also where it is run again."""
    x = rows_with_outliers(M, 2048, torch.bfloat16)
    weight_int8, col_scale = reference.quantize_weight(
        torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    )
    weight_int8, col_scale = weight_int8.to(device), col_scale.to(device)
    settings = {"outlier_rule": "row_rms", "outlier_threshold": 4.0}
    whole = ops.int8_linear(x.to(device), weight_int8, col_scale, **settings)
    for _ in range(3):
        again = ops.int8_linear(x.to(device), weight_int8, col_scale, **settings)
        assert torch.equal(again, whole)
    for m in range(M):
        other = rows_with_outliers(M, 2048, torch.bfloat16, seed=m + 1)
        other[m] = x[m]
        got = ops.int8_linear(other.to(device), weight_int8, col_scale, **settings)
        assert torch.equal(got[m], whole[m])


class Product:
    """Rows with everything that a product may have, on a device."""

    def __init__(self, x, N, device, rule=("row_rms", 4.0), rotation=0):
        K = x.shape[1]
        generator = torch.Generator().manual_seed(N)
        weight = torch.randn(N, K, generator=generator) / K**0.5
        weight_int8, col_scale = reference.quantize_weight(weight)
        hot = torch.arange(16, dtype=torch.int32) * (K // 16)
        self.rows = QuantizedRows(
            *(t.to(device) for t in ops.quantize_rows(x, *rule, hot, rotation))
        )
        self.weight = (weight_int8.to(device), col_scale.to(device))
        self.bias = torch.randn(N, generator=generator).to(x.dtype).to(device)
        self.hot_weight = weight[:, hot.long()].to(x.dtype).to(device)
        self.residual = torch.randn(len(x), N, generator=generator).to(x.dtype).to(device)

    def of(self, first, last):
        """The result of these rows alone."""
        return ops.int8_matmul(
            QuantizedRows(*(t[first:last] for t in self.rows)),
            *self.weight,
            self.bias,
            hot_weight=self.hot_weight,
            residual=self.residual[first:last],
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [520, 4224])  # from 4096 on another tile has more than 512 rows
@pytest.mark.parametrize("how", [(("row_rms", 4.0), 0), (("none", 0.0), 64)])
def test_every_kernel_gives_the_same_row(device, rows_with_outliers, dtype, N, how):
    """Bit for bit, on both sides of every edge of gemm_tiles.h, with and without a second plane."""
    product = Product(rows_with_outliers(600, 1040, dtype), N, device, *how)
    whole = product.of(0, 600)
    for M in (1, 8, 9, 17, 32, 33, 64, 65, 128, 129, 512, 513):
        assert torch.equal(product.of(0, M), whole[:M]), M
        assert torch.equal(product.of(600 - M, 600), whole[600 - M :]), M


def test_result_does_not_depend_on_blocks_of_outputs(device, rows_with_outliers):
    """More sums than lie in memory at once (kMaxSumsBytes), the last block narrower."""
    M, N = 2100, 8204
    assert M * N * 4 > 64 << 20
    product = Product(rows_with_outliers(M, 80, torch.bfloat16), N, device)
    whole = product.of(0, M)
    for first in range(0, M, 100):  # by another kernel
        assert torch.equal(product.of(first, first + 100), whole[first : first + 100])


def test_a_row_of_nan_gives_a_row_of_nan(device, rows_with_outliers):
    x = rows_with_outliers(20, 512, torch.float16)
    x[3, 7] = float("nan")
    weight_int8, col_scale = reference.quantize_weight(torch.randn(256, 512))
    settings = {"outlier_rule": "row_rms", "outlier_threshold": 4.0}
    for M in (4, 20):
        got = ops.int8_linear(
            x[:M].to(device), weight_int8.to(device), col_scale.to(device), **settings
        )
        assert got[3].isnan().all() and got[:3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("M", [1, 3, 8, 9, 16, 17, 32, 40])
def test_int8_weight_linear(device, rows_with_outliers, dtype, M, N, K):
    x = rows_with_outliers(M, K, dtype)
    generator = torch.Generator().manual_seed(N)
    weight_int8, col_scale = reference.quantize_weight(torch.randn(N, K, generator=generator))
    col_scale = col_scale / K**0.5
    bias = torch.randn(N, generator=generator).to(dtype)
    residual = torch.randn(M, N, generator=generator).to(dtype)
    arguments = (x, weight_int8, col_scale, bias, residual)
    want = reference.int8_weight_linear(*arguments)
    got = ops.int8_weight_linear(*(tensor.to(device) for tensor in arguments))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        got.cpu().float(),
        want.float(),
        rtol=tolerance,
        atol=tolerance * 1e-2 * float(want.float().abs().max()),
    )
