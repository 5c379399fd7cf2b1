"""Activations of the block: the right function, and the same bits wherever an element lies."""

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

from dist_int8.int8.activations import ACTIVATIONS

TRANSFORMERS = {
    "relu": ACT2FN["relu"],
    "gelu": ACT2FN["gelu"],
    "gelu_tanh": ACT2FN["gelu_new"],
    "bloom_gelu": bloom_gelu_forward,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_transformers(name):
    x = torch.linspace(-8, 8, 4001)
    torch.testing.assert_close(ACTIVATIONS[name](x), TRANSFORMERS[name](x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_a_row_does_not_depend_on_the_others(name, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for width in (100, 256, 1001):
            x = torch.randn(301, width, generator=torch.Generator().manual_seed(0)) * 3
            whole = ACTIVATIONS[name](x)
            for start, stop in ((0, 1), (5, 6), (7, 10), (3, 301), (100, 117)):
                assert torch.equal(ACTIVATIONS[name](x[start:stop].clone()), whole[start:stop])
    finally:
        torch.set_num_threads(before)
