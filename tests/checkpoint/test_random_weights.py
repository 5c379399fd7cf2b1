"""Random weights: the shapes of the real ones, finite answers, the same in any cut."""

import pytest
import torch

from dist_int8.checkpoint import load_stage
from dist_int8.checkpoint.load import random_stage
from dist_int8.models import describe, load_config


@pytest.mark.parametrize("name", ["llama", "llama_tied", "bloom", "opt", "gpt_neox"])
@pytest.mark.parametrize("int8", [True, False])
def test_shapes_dtypes_and_cuts(originals, name, int8):
    spec = describe(load_config(originals[name]))
    blocks = range(spec.num_blocks)
    whole = random_stage(spec, blocks, first=True, last=True, int8=int8)
    real = load_stage(originals[name], spec, blocks, first=True, last=True, int8=int8)
    made, expected = whole.state_dict(), real.state_dict()
    assert list(made) == list(expected)
    for key, tensor in made.items():
        assert (tensor.shape, tensor.dtype) == (expected[key].shape, expected[key].dtype), key
        assert tensor.dtype == torch.int8 or tensor.isfinite().all()
    assert (whole.lm_head.weight is whole.embedding.weight) == spec.tied_head
    last = random_stage(spec, blocks[1:], first=False, last=True, int8=int8).state_dict()
    assert all(torch.equal(tensor, made[key]) for key, tensor in last.items())
