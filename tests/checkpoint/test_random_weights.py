"""Random weights: the shapes of the real ones, finite answers, the same however a model is cut."""

import pytest
import torch
from tiny_models import load_tiny_stage

from dist_int8.checkpoint import StageFormat, make_random_stage
from dist_int8.models import StageSlice, describe, load_config


@pytest.mark.parametrize("name", ["llama", "llama_tied", "bloom", "opt", "gpt_neox"])
@pytest.mark.parametrize("int8", [True, False])
def test_shapes_and_dtypes_are_those_of_a_checkpoint_and_values_of_every_cut(originals, name, int8):
    spec = describe(load_config(originals[name]))
    stage_format = StageFormat(int8=int8)
    whole = make_random_stage(spec, StageSlice.whole(spec), stage_format)
    made = whole.state_dict()
    expected = load_tiny_stage(originals[name], int8=int8).state_dict()
    assert list(made) == list(expected)
    for key, tensor in made.items():
        assert (tensor.shape, tensor.dtype) == (expected[key].shape, expected[key].dtype), key
        assert tensor.dtype == torch.int8 or tensor.isfinite().all()
    assert (whole.lm_head.weight is whole.embedding.weight) == spec.tied_head
    rest = StageSlice(range(1, spec.num_blocks), first=False, last=True)
    last = make_random_stage(spec, rest, stage_format).state_dict()
    assert all(torch.equal(tensor, made[key]) for key, tensor in last.items())
