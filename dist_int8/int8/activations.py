"""The activations between two linear layers of an MLP without a gate."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# The square root of 2/pi and the cubic term of the tanh form of GELU (Hendrycks and Gimpel 2016).
_SQRT_2_OVER_PI = 0.7978845608028654
_CUBIC = 0.044715


# F.gelu(approximate="tanh") and F.silu round differently in the vector body and in the scalar tail
# of a tensor, so a token's result would depend on the size of its micro-batch. torch.tanh, torch's
# erf GELU and plain arithmetic do not: the tanh forms are therefore written out.
def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(_SQRT_2_OVER_PI * (x + _CUBIC * (x * x * x))))


def _bloom_gelu(x: Tensor) -> Tensor:
    """BLOOM's own rounding of the constant and order of the terms (Megatron-DeepSpeed)."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1.0 + _CUBIC * x * x)))


# In the order of the op activation_quantize's argument.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "bloom_gelu": _bloom_gelu,
}
