"""Every number of a config.json that makes no model is refused in one line that names it."""

import json

import pytest
from tiny_models import make_config

from dist_int8.models import describe, load_config

FAMILIES = ["llama", "mistral", "qwen2", "bloom", "opt", "gpt_neox"]
SIZES = {
    "hidden_size",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "intermediate_size",
    "ffn_dim",
    "vocab_size",
    "max_position_embeddings",
    "word_embed_proj_dim",
}
NO_SIZES = [0, -1, 1.5, "4", True, [4], 10**30]
REALS = {"rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta"}
NO_REALS = [-1, "1e-5", True, [1.0], 10**30]


def write(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def make_fields(family):
    heads = {} if family in ("bloom", "opt", "gpt_neox") else {"num_key_value_heads": 2}
    return make_config(family, **heads).to_dict()


def list_changes(family):
    fields = make_fields(family)
    for names, values in ((SIZES, NO_SIZES), (REALS, NO_REALS)):
        yield from ((key, value) for key in names & fields.keys() for value in values)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_that_make_no_model_are_named(tmp_path, family):
    fields = make_fields(family)
    describe(load_config(write(tmp_path, fields)))
    for key, value in list_changes(family):
        with pytest.raises(ValueError, match=rf"config\.json:{key}: must be ") as error:
            describe(load_config(write(tmp_path, {**fields, key: value})))
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_are_absent_are_not_those_of_another_model(tmp_path, family):
    fields = make_fields(family)
    needed = {"hidden_size", "vocab_size", "intermediate_size", "ffn_dim", "num_attention_heads"}
    for key in needed & fields.keys():
        rest = {name: value for name, value in fields.items() if name != key}
        with pytest.raises(ValueError, match=rf"config\.json:{key}: must be .*got nothing"):
            load_config(write(tmp_path, rest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads: must divide hidden"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: must divide num_attention_heads 4"),
        ({"head_dim": 7}, "head_dim: must be even"),
        ({"head_dim": 0}, "head_dim: must be an integer"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: must be a list of class names"),
        ({"architectures": [1]}, "architectures: must be a list of class names"),
        ({"torch_dtype": []}, "torch_dtype: must be a floating dtype"),
        ({"dtype": "int8"}, "dtype: must be a floating dtype"),
        ({"model_type": ["llama"]}, "model_type: must be one of"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, r"rope_scaling\.factor: must be"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, r"rope_scaling\.factor: must"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 0}},
            r"rope_scaling\.?:?original_max_position_embeddings: must be an integer",
        ),
        ({"rope_scaling": [4.0]}, "rope"),
    ],
)
def test_numbers_that_contradict_each_other_are_named(tmp_path, changes, message):
    fields = {**make_config("llama").to_dict(), **changes}
    if "rope_scaling" in changes:  # as files before rope_parameters have it
        del fields["rope_parameters"]
    with pytest.raises(ValueError, match=message) as error:
        describe(load_config(write(tmp_path, fields)))
    assert "\n" not in str(error.value)


def test_a_dtype_of_storage_is_not_what_a_model_runs_in(tmp_path):
    fields = make_config("llama").to_dict()
    for stored, run in (("float64", "float32"), ("float8_e4m3fn", "bfloat16"), ("float16",) * 2):
        config = load_config(write(tmp_path, {**fields, "dtype": stored}))
        assert str(config.dtype) == f"torch.{run}"
