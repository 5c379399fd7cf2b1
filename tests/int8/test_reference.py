"""The specification against torch's float64 products, and torch's and bitsandbytes' quantizers."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_int8.int8 import reference

RULES = [("none", 0.0), ("absolute", 6.0), ("row_rms", 4.0), ("all", 0.0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows_with_outliers(num_rows: int, num_features: int, seed: int = 0) -> torch.Tensor:
    """Gaussian rows with six features 20 to 60 times larger, as models of 6.7B and more have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_features, generator=generator)
    columns = torch.randperm(num_features, generator=generator)[:6]
    x[:, columns] *= 20 + 40 * torch.rand(6, generator=generator)
    return x


def restored(x_int8: torch.Tensor, x_high: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """What the planes stand for, in float64."""
    values = x_int8.double()
    if len(x_high):
        values = values + 128 * x_high.double()
    return row_scale.double()[:, None] * values


def test_row_worked_by_hand():
    x = torch.tensor([[127.0, -64.0, 0.5, 1.5, 2.5, -3.5], [254.0, 1000.0, -2032.0, 1.0, 3.0, 0.0]])
    x_int8, x_high, row_scale, _, _ = reference.quantize_rows(x, "absolute", 500.0)
    assert row_scale.tolist() == [1.0, 2.0]
    assert x_int8.tolist() == [[127, -64, 0, 2, 2, -4], [127, -12, 8, 0, 2, 0]]
    assert x_high.tolist() == [[0, 0, 0, 0, 0, 0], [0, 4, -8, 0, 0, 0]]


@pytest.mark.parametrize(("rule", "threshold"), RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_restore_x_to_half_a_step(rule, threshold, dtype):
    x = rows_with_outliers(16, 96).to(dtype)
    x_int8, x_high, row_scale, _, _ = reference.quantize_rows(x, rule, threshold)
    error = (restored(x_int8, x_high, row_scale) - x.double()).abs()
    largest = x.double().abs().amax(dim=1, keepdim=True)
    assert (error <= 0.5 * row_scale.double()[:, None] + 1e-6 * largest).all()
    assert row_scale.dtype == torch.float32
    assert (x_high != 0).any() == (rule != "none")


@pytest.mark.parametrize(("rule", "threshold"), RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_is_the_float64_product_of_what_was_rounded(rule, threshold, dtype):
    x, bias = rows_with_outliers(8, 128).to(dtype), torch.randn(40)
    weight_int8, col_scale = reference.quantize_weight(torch.randn(40, 128).to(dtype))
    y = reference.int8_linear(
        x, weight_int8, col_scale, bias, outlier_rule=rule, outlier_threshold=threshold
    )
    x_restored = restored(*reference.quantize_rows(x, rule, threshold)[:3])
    weight = weight_int8.double() * col_scale.double()[:, None]
    expected = x_restored @ weight.T + bias.double()
    assert y.dtype == dtype
    # One rounding to the output dtype, plus a few fp32 roundings of the largest term.
    torch.testing.assert_close(
        y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6 * float(expected.abs().max())
    )


def test_two_planes_are_far_more_exact_than_one_where_there_are_outliers():
    x, weight = rows_with_outliers(32, 512), torch.randn(64, 512)
    weight_int8, col_scale = reference.quantize_weight(weight)
    exact = x.double() @ (weight_int8.double() * col_scale.double()[:, None]).T

    def error(rule: str, threshold: float) -> float:
        y = reference.int8_linear(
            x, weight_int8, col_scale, outlier_rule=rule, outlier_threshold=threshold
        )
        return float((y.double() - exact).norm() / exact.norm())

    assert error("absolute", 6.0) < error("none", 0.0) / 5
    assert error("row_rms", 4.0) < error("none", 0.0) / 3
    assert error("all", 0.0) < error("absolute", 6.0) / 3


def test_absolute_rule_is_inclusive_and_row_rms_is_relative():
    x = torch.tensor([[6.0, 5.9999, -6.0, 0.0], [1.0, 1.0, 1.0, -1.0], [8.0, 0.0, 0.0, 0.0]])
    assert reference.outlier_mask(x, "absolute", 6.0).tolist() == [
        [True, False, True, False],
        [False] * 4,
        [True, False, False, False],
    ]
    # rms of the last row is 4: its only element is exactly twice that. Scale changes nothing.
    for scale in (1.0, 1e-3, 1e30):
        mask = reference.outlier_mask(x * scale, "row_rms", 2.0)
        assert mask.tolist() == [[False] * 4, [False] * 4, [True, False, False, False]]
    assert reference.outlier_mask(x, "all", 0.0).all()
    assert not reference.outlier_mask(x, "none", 6.0).any()


@pytest.mark.parametrize("rule", ["absolute", "row_rms"])
def test_threshold_zero_turns_the_decomposition_off(rule):
    x = rows_with_outliers(4, 64)
    for ours, naive in zip(
        reference.quantize_rows(x, rule, 0.0), reference.quantize_rows(x, "none", 0.0), strict=True
    ):
        assert torch.equal(ours, naive)


def test_row_where_everything_is_an_outlier_uses_both_planes_in_full():
    x = torch.tensor([[16256.0, -8128.0, 100.0, -7.0]])
    x_int8, x_high, row_scale, _, _ = reference.quantize_rows(x, "absolute", 6.0)
    assert row_scale.tolist() == [1.0]
    assert restored(x_int8, x_high, row_scale).tolist() == x.tolist()
    assert x_high[0, 0] == 127


@pytest.mark.parametrize(("rule", "threshold"), RULES)
def test_rows_of_zeros_nan_and_inf(rule, threshold):
    x = rows_with_outliers(6, 64)
    clean = x.clone()
    x[1] = 0
    x[2, 5] = float("nan")
    x[3, 0] = float("inf")
    x[4, 63] = -float("inf")
    weight_int8, col_scale = reference.quantize_weight(torch.randn(8, 64))

    def run(rows: torch.Tensor) -> torch.Tensor:
        return reference.int8_linear(
            rows, weight_int8, col_scale, outlier_rule=rule, outlier_threshold=threshold
        )

    y = run(x)
    assert (y[1] == 0).all()
    assert y[2:5].isnan().all()
    x_int8, x_high, row_scale, _, _ = reference.quantize_rows(x, rule, threshold)
    assert not x_int8[1:5].any() and not x_high[1:5].any()
    assert len(x_high) == (0 if rule == "none" else len(x))
    assert row_scale[1] == 0 and row_scale[2:5].isnan().all()
    assert torch.equal(y[[0, 5]], run(clean)[[0, 5]])


@pytest.mark.parametrize(("rule", "threshold"), RULES)
def test_a_row_too_small_for_a_normal_scale_counts_as_zero(rule, threshold):
    x = torch.tensor([[190 * 2.0**-149, 0.0], [127 * 2.0**-127, 0.0], [16256 * 2.0**-126, 0.0]])
    x_int8, x_high, row_scale, _, _ = reference.quantize_rows(x, rule, threshold)
    assert not x_int8[:2].any() and not x_high[:2].any()
    assert row_scale[:2].tolist() == [0.0, 0.0]
    assert restored(x_int8, x_high, row_scale)[2].tolist() == x[2].double().tolist()


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    st.sampled_from([*RULES, ("absolute", 1e-3), ("row_rms", 1.0)]),
)
@settings(max_examples=300, deadline=None)
def test_any_finite_row_stays_on_the_planes(row, rule):
    x = torch.tensor([row], dtype=torch.float32)
    x_int8, x_high, row_scale, _, _ = reference.quantize_rows(x, *rule)
    assert x_int8.abs().max() <= 127
    if (x_high != 0).any():
        assert x_high.abs().max() <= 127 and x_int8[x_high != 0].abs().max() <= 64
    # Half a step, or nothing at all where the step would be below the smallest normal number.
    bound = max(0.5 * float(row_scale[0]), 2.0**-126 * 16256 if row_scale[0] == 0 else 0.0)
    error = (restored(x_int8, x_high, row_scale) - x.double()).abs()
    assert float(error.max()) <= bound + 1e-6 * float(x.abs().max())


@pytest.mark.parametrize(("rule", "threshold"), RULES)
def test_rows_are_independent(rule, threshold):
    x = rows_with_outliers(9, 64)
    together = reference.quantize_rows(x, rule, threshold)
    for row in range(9):
        alone = reference.quantize_rows(x[row : row + 1], rule, threshold)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[:1], b[row : row + 1])


@pytest.mark.parametrize("K", [1, 64, 65, 2047, 2048, 2049, 5000])
def test_high_tiles_name_the_tiles_with_outliers(K):
    x = torch.randn(4, K)
    for row, column in [(0, 0), (1, K // 2), (2, K - 1), (3, 0), (3, K - 1)]:
        x[row, column] = 500.0
    _, x_high, _, high_tiles, x_hot = reference.quantize_rows(x, "absolute", 6.0)
    assert high_tiles.dtype == torch.int32 and x_hot.shape == (4, 0) and x_hot.dtype == x.dtype
    assert high_tiles.shape == (4, -(-K // 2048))
    for row in range(4):
        flagged = {
            tile
            for tile in range(32 * high_tiles.shape[1])
            if (high_tiles[row, tile // 32].item() >> (tile % 32)) & 1
        }
        assert flagged == {k // 64 for k in range(K) if x_high[row, k] != 0} != set()


def test_x_hot_is_what_the_hot_columns_held():
    x = rows_with_outliers(3, 40).bfloat16()
    x[1, 7] = float("inf")  # a hot column is not looked at
    hot = torch.tensor([7, 39, 0], dtype=torch.int32)
    rows = reference.quantize_rows(x, "row_rms", 4.0, hot)
    assert torch.equal(rows.x_hot, x[:, [7, 39, 0]]) and rows.row_scale.isfinite().all()


def test_hot_columns_take_no_part_in_the_integers_and_add_an_exact_product():
    x, weight, bias = rows_with_outliers(8, 64), torch.randn(24, 64), torch.randn(24)
    hot = x.abs().amax(dim=0).topk(6).indices.to(torch.int32)
    x_int8, x_high, row_scale, _, _ = reference.quantize_rows(x, "none", 0.0, hot)
    cold = x.clone()
    cold[:, hot.long()] = 0
    assert not x_int8[:, hot.long()].any()
    x_int8_cold, x_high_cold, row_scale_cold, _, _ = reference.quantize_rows(cold, "none", 0.0)
    assert torch.equal(x_int8, x_int8_cold) and torch.equal(x_high, x_high_cold)
    assert torch.equal(row_scale, row_scale_cold)

    weight_int8, col_scale = reference.quantize_weight(weight)
    y = reference.int8_linear(
        x,
        weight_int8,
        col_scale,
        bias,
        outlier_rule="none",
        outlier_threshold=0.0,
        hot_columns=hot,
        hot_weight=weight[:, hot.long()],
    )
    expected = restored(x_int8, x_high, row_scale) @ (
        weight_int8.double() * col_scale.double()[:, None]
    ).T + (x[:, hot.long()].double() @ weight[:, hot.long()].double().T + bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-4)


def test_sums_are_exact_integers_at_large_k():
    K = 133_144  # the most products of 127 * 127 that an int32 holds
    generator = torch.Generator().manual_seed(0)
    planes = torch.randint(-127, 128, (2, 3, K), dtype=torch.int8, generator=generator)
    weight_int8 = torch.randint(-127, 128, (4, K), dtype=torch.int8, generator=generator)
    planes[:, 0], weight_int8[0] = 127, 127
    total = reference.integer_product(planes[0], planes[1], weight_int8)
    expected = (planes[0].long() + 128 * planes[1].long()) @ weight_int8.long().T
    assert torch.equal(total.long(), expected)
    assert total[0, 0] == 129 * 127 * 127 * K


def test_quantize_weight_is_torchs_per_channel_quantizer():
    # Scales that are powers of two: no division is inexact, so even the ties must agree.
    generator = torch.Generator().manual_seed(0)
    scale = 2.0 ** torch.arange(-6, 6)
    weight = (torch.randint(-254, 255, (12, 64), generator=generator) / 2) * scale[:, None]
    weight[:, 7] = 127 * scale
    weight_int8, col_scale = reference.quantize_weight(weight)
    zero_points = torch.zeros(12, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight, scale, zero_points, 0, -127, 127)
    assert torch.equal(reference.dequantize_weight(weight_int8, col_scale), theirs)
    assert torch.equal(col_scale, scale)


def test_quantize_weight_is_bitsandbytes_vectorwise_quantizer():
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)).half()
    weight_int8, col_scale = reference.quantize_weight(weight)
    theirs, absmax, _ = bnb.int8_vectorwise_quant(weight)
    assert (weight_int8 != theirs).float().mean() <= 1 / 500  # they multiply by 127 / absmax
    assert (weight_int8.int() - theirs.int()).abs().max() <= 1
    torch.testing.assert_close(col_scale * 127, absmax, rtol=1e-6, atol=0)


def test_quantize_weight_of_zeros_nan_and_inf():
    weight = torch.ones(4, 8)
    weight[1], weight[2, 3], weight[3, 0] = 0, float("nan"), float("inf")
    weight_int8, col_scale = reference.quantize_weight(weight)
    dequantized = reference.dequantize_weight(weight_int8, col_scale)
    torch.testing.assert_close(dequantized[0], torch.ones(8))
    assert (dequantized[1] == 0).all()
    assert dequantized[2:].isnan().all()
    assert col_scale[2:].isnan().all() and not weight_int8[1:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_weight_is_within_half_a_step(dtype):
    weight = torch.randn(32, 100).to(dtype)
    weight_int8, col_scale = reference.quantize_weight(weight)
    error = (reference.dequantize_weight(weight_int8, col_scale) - weight.float()).abs()
    assert (error <= 0.5 * col_scale[:, None] * (1 + 1e-5)).all()
    assert (weight_int8.int().abs().amax(dim=1) == 127).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, s: reference.quantize_rows(x, "most", 6.0), "outlier_rule must be one of"),
        (lambda x, w, s: reference.quantize_rows(x, "absolute", -1.0), "outlier_threshold must be"),
        (lambda x, w, s: reference.quantize_rows(x, "row_rms", float("nan")), "outlier_threshold"),
        (lambda x, w, s: reference.quantize_rows(x[0], "none", 0.0), r"matrix, got shape \[8\]"),
        (lambda x, w, s: reference.quantize_rows(x.double(), "none", 0.0), "got torch.float64"),
        (lambda x, w, s: reference.quantize_weight(x.int()), "weight must be float32"),
        (
            lambda x, w, s: reference.int8_linear(
                x[:, :4], w, s, outlier_rule="none", outlier_threshold=0.0
            ),
            r"weight_int8 must be int8 \[N, K=4\], got torch.int8 \[3, 8\]",
        ),
        (
            lambda x, w, s: reference.int8_linear(
                x, w, s, outlier_rule="none", outlier_threshold=0.0, hot_weight=torch.ones(3, 1)
            ),
            "hot_columns and hot_weight must be given together",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    weight_int8, col_scale = reference.quantize_weight(torch.randn(3, 8))
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 8), weight_int8, col_scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.ones(3, 3)}, r"residual must be \[2, 4\], got \[3, 3\]"),
        ({"bias": torch.ones(3)}, r"bias must be \[4\], got \[3\]"),
        ({"col_scale": torch.ones(1, 4)}, r"col_scale must be \[4\], got \[1, 4\]"),
    ],
)
def test_int8_weight_linear_names_the_shape_that_does_not_fit(change, message):
    arguments = {
        "x": torch.ones(2, 5),
        "weight_int8": torch.ones(4, 5, dtype=torch.int8),
        "col_scale": torch.ones(4),
    }
    with pytest.raises(ValueError, match=message):
        reference.int8_weight_linear(**(arguments | change))
