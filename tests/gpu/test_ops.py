"""Every op on a GPU against the specification, and the compiled kernels by name."""

import pytest
import torch

from dist_int8.int8 import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows_with_outliers(M, K, dtype):
    generator = torch.Generator().manual_seed(M * K)
    x = torch.randn(M, K, generator=generator)
    x[:, ::97] *= 40
    x[0] = 0
    return x.to(dtype).cuda()


def test_the_library_has_a_kernel_for_this_gpu():
    assert "quantize_rows" in ops.library_info()["cuda_ops"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", reference.OUTLIER_RULES)
@pytest.mark.parametrize(("M", "K"), [(1, 576), (3, 577), (37, 4096), (5, 14336)])
def test_quantize_rows_equals_the_specification(dtype, rule, M, K):
    x = rows_with_outliers(M, K, dtype)
    low, high, scale, _, _ = ops.quantize_rows(x, rule, 6.0)
    want_low, want_high, want_scale, _, _ = reference.quantize_rows(x.cpu(), rule, 6.0)
    torch.testing.assert_close(scale.cpu(), want_scale, rtol=1e-6, atol=0)
    difference = low.cpu().int() + 128 * high.cpu().int() - want_low.int() - 128 * want_high.int()
    # a quotient that falls on the half between two steps may round either way
    assert difference.abs().max() <= 1 and difference.count_nonzero() <= M * K / 500


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 17, 64])
def test_int8_linear_is_close_to_the_specification(dtype, M):
    x = rows_with_outliers(M, 512, dtype)
    weight = torch.randn(384, 512, generator=torch.Generator().manual_seed(1))
    weight_int8, col_scale = reference.quantize_weight(weight)
    bias = torch.randn(384, generator=torch.Generator().manual_seed(2)).to(dtype)
    arguments = {"outlier_rule": "row_rms", "outlier_threshold": 4.0}
    got = ops.int8_linear(x, weight_int8.cuda(), col_scale.cuda(), bias.cuda(), **arguments)
    want = reference.int8_linear(x.cpu(), weight_int8, col_scale, bias, **arguments)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.cpu().float(), want.float(), rtol=tolerance, atol=tolerance)


def test_a_row_of_nan_stays_in_its_row():
    x = rows_with_outliers(4, 256, torch.float16)
    x[2, 5] = float("nan")
    scale = ops.quantize_rows(x, "row_rms", 4.0).row_scale
    assert scale.isnan().tolist() == [False, False, True, False]
