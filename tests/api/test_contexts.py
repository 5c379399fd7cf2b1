"""Contexts that rope scaling stretches and lists of linears, through `load()`."""

import json

import pytest
import torch
from tiny_models import make_config
from transformers import AutoModelForCausalLM

import dist_int8


@pytest.fixture
def write(tmp_path):
    """A function: fields of config.json -> the folder of one Llama with them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama", initializer_range=0.3))
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["rope_parameters"]

    def change(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
        return tmp_path

    return change


@pytest.mark.parametrize(
    "scaling",
    [
        # as Qwen2.5's card has it, and as files of other years write it
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 4.0},
    ],
)
def test_the_logits_beyond_max_position_embeddings_are_those_of_transformers(write, scaling):
    folder = write(rope_theta=1e6, rope_scaling=scaling)
    ids = torch.randint(97, (256,))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model(ids[None]).logits[0]
    with dist_int8.load(folder, devices=["cpu"], int8=False, max_tokens=256) as ours:
        torch.testing.assert_close(ours.logits([ids.tolist()])[0], expected, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="at most the model's 256 positions, got 257; lower it"):
        dist_int8.load(folder, devices=["cpu"], max_tokens=257)


def test_a_variant_that_changes_as_a_sequence_grows_ends_there_and_says_why(write):
    folder = write(rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    with pytest.raises(ValueError, match=r"64 positions, got 65; .*'dynamic' changes the frequenc"):
        dist_int8.load(folder, devices=["cpu"], max_tokens=65)


def test_a_name_of_the_checkpoint_keeps_the_whole_matrix_floating(write):
    folder = write()
    ids = list(range(3, 40))
    options = {"devices": ["cpu"], "max_tokens": 64}
    with dist_int8.load(folder, skip_modules=["q_proj", "lm_head"], **options) as model:
        got = model.logits([ids])[0]
    with dist_int8.load(folder, skip_modules=["qkv", "lm_head"], **options) as model:
        assert torch.equal(model.logits([ids])[0], got)
    with dist_int8.load(folder, **options) as model:
        assert not torch.equal(model.logits([ids])[0], got)
    with pytest.raises(ValueError, match=r"load\(\): skip_modules: must name linears .*got 'nope'"):
        dist_int8.load(folder, skip_modules=["nope"], **options)
