"""Linear layers as other methods compute them, each a replacement for a floating-point one.

All take floating-point x [..., K] and return [..., N] in x's dtype; sums of int8 products are
exact. "All of x" means all rows of the call: a window of tokens.
"""

import logging
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dist_int8.int8 import reference

PLANE_MAX = reference.PLANE_MAX


class Matrix:
    """A floating-point weight [N, K] and its int8 forms, made once and shared by the methods.

    Attributes:
        weight: weight [N, K] in fp32.
        bias: bias [N], or None.
        absmax: largest magnitude of each input feature on a calibration text, [K]; None before
            calibration.
    """

    def __init__(self, linear: nn.Linear, absmax: Tensor | None = None) -> None:
        self.linear = linear
        self.weight = linear.weight.detach()
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.absmax = absmax

    @cached_property
    def per_row(self) -> tuple[Tensor, Tensor]:
        """Weight in int8 [N, K], and one scale per row [N]."""
        return reference.quantize_weight(self.weight)

    @cached_property
    def per_tensor(self) -> tuple[Tensor, Tensor]:
        """Weight in int8 [N, K], and one scale []."""
        scale = self.weight.abs().amax() / PLANE_MAX
        return _rounded(self.weight, scale), scale

    @cached_property
    def zero_point(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight in int8 [N, K], one step and the zero point to add back, both []."""
        return _zero_point(self.weight)


EXACT_K = 1024


def integer_product(x_int8: Tensor, weight_int8: Tensor) -> Tensor:
    """Multiplies x_int8 [M, K] @ weight_int8 [N, K].T exactly, into int32 [M, N].

    In fp32, which holds the sum of 1,024 products of int8 exactly (2**24 at most), because torch's
    own integer product is an order of magnitude slower on CPUs.
    """
    shape = (x_int8.shape[0], weight_int8.shape[0])
    total = torch.zeros(shape, dtype=torch.int32, device=x_int8.device)
    pieces = zip(x_int8.split(EXACT_K, -1), weight_int8.split(EXACT_K, -1), strict=True)
    for x, weight in pieces:
        total += (x.float() @ weight.float().t()).int()
    return total


class _Replacement(nn.Module):
    """Base of the replacements of a linear; it handles the bias and leading dimensions."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, x.shape[-1]).float())
        if self.matrix.bias is not None:
            y = y + self.matrix.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        """Multiplies x, fp32 [M, K], by the weight into fp32 [M, N]."""
        raise NotImplementedError


class Floating(_Replacement):
    """The same layer in floating point."""

    def product(self, x: Tensor) -> Tensor:
        return x @ self.matrix.weight.T


class WeightsOnly(_Replacement):
    """int8 weights with one scale per output feature; activations stay in floating point."""

    def product(self, x: Tensor) -> Tensor:
        weight_int8, scale = self.matrix.per_row
        return (x @ weight_int8.float().T) * scale


class Absmax(_Replacement):
    """One scale for all of x and one for the weight (LLM.int8() paper, section 2.1)."""

    def product(self, x: Tensor) -> Tensor:
        weight_int8, weight_scale = self.matrix.per_tensor
        scale = x.abs().amax() / PLANE_MAX
        return integer_product(_rounded(x, scale), weight_int8) * (scale * weight_scale)


class ZeroPoint(_Replacement):
    """One step and one offset for all of x, and likewise for the weight (section 2.1)."""

    def product(self, x: Tensor) -> Tensor:
        q_w, step_w, zero_w = self.matrix.zero_point
        q_x, step_x, zero_x = _zero_point(x)
        # (q_x + zero_x) @ (q_w + zero_w).T, multiplied out
        zero_x, zero_w = zero_x.double(), zero_w.double()
        total = integer_product(q_x, q_w).double()
        total += zero_x * q_w.sum(1) + zero_x * zero_w * x.shape[1]
        total += zero_w * q_x.sum(1)[:, None]
        return (total * (step_x.double() * step_w.double())).float()


class RowWise(_Replacement):
    """One scale per row of x and one for the weight (Table 1 of the paper)."""

    def product(self, x: Tensor) -> Tensor:
        weight_int8, weight_scale = self.matrix.per_tensor
        scale = x.abs().amax(1, keepdim=True) / PLANE_MAX
        return integer_product(_rounded(x, scale), weight_int8) * (scale * weight_scale)


class VectorWise(_Replacement):
    """One scale per row of x and of the weight: naive W8A8 (section 3.1)."""

    def product(self, x: Tensor) -> Tensor:
        weight_int8, weight_scale = self.matrix.per_row
        scale = x.abs().amax(1, keepdim=True) / PLANE_MAX
        return integer_product(_rounded(x, scale), weight_int8) * (scale * weight_scale)


class LlmInt8(_Replacement):
    """LLM.int8() as published (section 3.2).

    Input features with |x| >= 6 in any row of x leave the int8 product for all rows. They are
    multiplied by their floating-point weights as the checkpoint has them, often in 16 bits.
    """

    threshold = 6.0

    def product(self, x: Tensor) -> Tensor:
        columns = (x.abs() >= self.threshold).any(0).nonzero()[:, 0]
        rest = x.index_fill(1, columns, 0.0)
        weight_int8, weight_scale = self.matrix.per_row
        scale = rest.abs().amax(1, keepdim=True) / PLANE_MAX
        y = integer_product(_rounded(rest, scale), weight_int8) * (scale * weight_scale)
        return y + x[:, columns] @ self.matrix.weight[:, columns].T


class SmoothQuant(_Replacement):
    """SmoothQuant-style W8A8 (Xiao et al. 2022, arXiv:2211.10438, equation 4), alpha = 0.5.

    Each input feature of x is divided by s = sqrt(absmax of x / absmax of the weight), its column
    of the weight is multiplied by s, and both then get one scale per row. absmax of x comes from a
    calibration text. Every linear has its own s; the paper smooths only linears after a norm, where
    the division costs nothing.
    """

    alpha = 0.5

    def __init__(self, matrix: Matrix) -> None:
        super().__init__(matrix)
        assert matrix.absmax is not None, "SmoothQuant needs a calibrated matrix"
        of_weight = matrix.weight.abs().amax(0)
        smooth = matrix.absmax**self.alpha / of_weight.clamp(min=1e-8) ** (1 - self.alpha)
        self.smooth = smooth.clamp(min=1e-5)
        self.weight_int8, self.weight_scale = reference.quantize_weight(matrix.weight * self.smooth)

    def product(self, x: Tensor) -> Tensor:
        x = x / self.smooth
        scale = x.abs().amax(1, keepdim=True) / PLANE_MAX
        product = integer_product(_rounded(x, scale), self.weight_int8)
        return product * (scale * self.weight_scale)


def import_bitsandbytes() -> Any:
    """Imports bitsandbytes without its warnings.

    On import it names kernels that it cannot fetch from the hub (CPUs with AVX512-BF16), and each
    layer says that it computes in fp16: nothing that the reader of a table can change.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def bitsandbytes_linear(matrix: Matrix, threshold: float) -> nn.Module:
    """Makes bitsandbytes' own `Linear8bitLt`."""
    bitsandbytes = import_bitsandbytes()
    linear = matrix.linear
    theirs = bitsandbytes.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=matrix.bias is not None,
        has_fp16_weights=False,
        threshold=threshold,
    )
    theirs.weight = bitsandbytes.nn.Int8Params(
        matrix.weight.clone(), requires_grad=False, has_fp16_weights=False
    )
    if matrix.bias is not None:
        theirs.bias = nn.Parameter(matrix.bias.clone(), requires_grad=False)
    return theirs.to("cpu").eval()


def torchao_linear(matrix: Matrix) -> nn.Module:
    """Makes torchao's linear of int8 weights and dynamic int8 activations, one scale per row."""
    # it warns about CUDA kernels that a CPU cannot load
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linear = matrix.linear
    copy = nn.Linear(
        linear.in_features, linear.out_features, bias=matrix.bias is not None, device="meta"
    )
    copy.weight = nn.Parameter(matrix.weight.clone(), requires_grad=False)
    if matrix.bias is not None:
        copy.bias = nn.Parameter(matrix.bias.clone(), requires_grad=False)
    holder = nn.Sequential(copy)  # quantize_ swaps the children of a module
    quantize_(holder, Int8DynamicActivationInt8WeightConfig())
    return holder[0]


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    """Rounds x / scale to the nearest int8; gives zeros where the scale is 0."""
    return torch.where(scale > 0, x / scale, 0.0).round_().to(torch.int8)


def _zero_point(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes x ~= (q + zero) * step, with q in -127..127 over the range of x's elements.

    If all elements are equal, q is 0, zero is 1 and step is their value.
    """
    low, high = torch.aminmax(x)
    step = (high - low) / (2 * PLANE_MAX)
    if step == 0:
        return torch.zeros_like(x, dtype=torch.int8), low, torch.ones_like(low)
    zero = (low / step).round() + PLANE_MAX
    q = ((x / step).round() - zero).clamp(-PLANE_MAX, PLANE_MAX)
    return q.to(torch.int8), step, zero
