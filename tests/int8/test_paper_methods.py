"""The methods that the LLM.int8() paper compares, against bitsandbytes and the paper's table."""

import itertools

import bitsandbytes.functional as bnb
import torch

from dist_int8.int8 import paper_methods


def rows_with_outliers(num_rows: int, num_features: int, seed: int = 0) -> torch.Tensor:
    """Gaussian rows with six features 20 to 60 times larger, as models of 6.7B and more have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_features, generator=generator)
    columns = torch.randperm(num_features, generator=generator)[:6]
    x[:, columns] *= 20 + 40 * torch.rand(6, generator=generator)
    return x


def test_union_of_columns_is_what_bitsandbytes_computes():
    x = rows_with_outliers(8, 64).half()
    weight = torch.randn(32, 64).half()
    x_int8, absmax, columns = bnb.int8_vectorwise_quant(x.clone(), threshold=6.0)
    weight_int8, weight_absmax, _ = bnb.int8_vectorwise_quant(weight)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x.float(), x_int8, weight_int8, absmax, weight_absmax, columns
    )
    ours = paper_methods.llm_int8_linear(x.float(), weight, 6.0, union_of_columns=True)
    # Their CPU constant for 1 / 127**2 is 1.8e-5 too large.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert len(columns) > 0


def test_llm_int8_without_outliers_is_vector_wise_and_with_only_outliers_is_floating_point():
    x, weight = torch.randn(8, 64), torch.randn(32, 64)
    assert torch.equal(
        paper_methods.llm_int8_linear(x, weight, threshold=100.0),
        paper_methods.vector_wise_linear(x, weight),
    )
    large = x.sign() * (6 + x.abs())
    torch.testing.assert_close(
        paper_methods.llm_int8_linear(large, weight), large @ weight.T, rtol=1e-5, atol=1e-4
    )


def test_llm_int8_rows_are_independent_unless_the_union_is_asked_for():
    x, weight = rows_with_outliers(6, 64), torch.randn(16, 64)
    x[0] = torch.randn(64).clamp(-3, 3)
    alone, together = (paper_methods.llm_int8_linear(rows, weight)[0] for rows in (x[:1], x))
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-5)
    alone, together = (
        paper_methods.llm_int8_linear(rows, weight, union_of_columns=True)[0] for rows in (x[:1], x)
    )
    assert (alone - together).abs().max() > 1e-3


def test_paper_methods_are_exact_on_integers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (6, 32), generator=generator).float()
    weight = torch.randint(-127, 128, (5, 32), generator=generator).float()
    x[:, 0], weight[:, 0] = 127, 127
    exact = (x.double() @ weight.double().T).float()
    for method in (
        paper_methods.absmax_linear,
        paper_methods.row_wise_linear,
        paper_methods.vector_wise_linear,
    ):
        torch.testing.assert_close(method(x, weight), exact, rtol=1e-6, atol=1e-2)
    shifted = torch.randint(1000, 1255, (6, 32), generator=generator).float()
    shifted[0, 0], shifted[0, 1] = 1000, 1254
    signed = weight.clone()
    signed[0, 1] = -127
    exact = (shifted.double() @ signed.double().T).float()
    torch.testing.assert_close(
        paper_methods.zeropoint_linear(shifted, signed), exact, rtol=1e-6, atol=1e-1
    )


def test_paper_methods_rank_as_in_its_table():
    """Table 1, errors: absmax > row-wise > vector-wise > with decomposition. And section 2.1:
    zero-point wins where x is one-sided."""
    x = rows_with_outliers(64, 512) * (0.2 + torch.rand(64, 1))
    weight = torch.randn(128, 512) * (0.2 + torch.rand(128, 1))

    def error(method, rows: torch.Tensor) -> float:
        exact = rows.double() @ weight.double().T
        return float((method(rows, weight).double() - exact).norm() / exact.norm())

    methods = (
        paper_methods.absmax_linear,
        paper_methods.row_wise_linear,
        paper_methods.vector_wise_linear,
        paper_methods.llm_int8_linear,
    )
    errors = [error(method, x) for method in methods]
    assert all(better < 0.99 * worse for worse, better in itertools.pairwise(errors))
    one_sided = torch.randn(64, 512).relu()
    assert error(paper_methods.zeropoint_linear, one_sided) < error(
        paper_methods.absmax_linear, one_sided
    )
