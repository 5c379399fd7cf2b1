"""What is read from a config, and what is refused."""

import json

import pytest
from huggingface_hub import constants

from dist_int8.models import StageSlice, describe, load_config, notice, tensor_sources

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
BLOOM = {"model_type": "bloom", "hidden_size": 48, "n_head": 4, "n_layer": 2, "vocab_size": 97}
OPT = {
    "model_type": "opt",
    "hidden_size": 48,
    "ffn_dim": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
}
NEOX = {**LLAMA, "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}


@pytest.fixture
def folder_of(tmp_path):
    """A function: config fields -> folder with that config.json."""

    def write(fields):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return tmp_path

    return write


def describe_fields(folder):
    return describe(load_config(folder))


def test_rope_fields_of_old_files_are_read(folder_of):
    # As in the files of SmolLM2, Llama 3.1 and GPT-NeoX-20b, written long before rope_parameters.
    spec = describe_fields(folder_of({**LLAMA, "rope_theta": 1e5, "rope_interleaved": False}))
    assert spec.rotary.inv_freq[1] == pytest.approx(1e5 ** (-1 / 6))
    scaled = {"rope_type": "linear", "factor": 2.0}
    spec = describe_fields(folder_of({**LLAMA, "rope_theta": 1e5, "rope_scaling": scaled}))
    assert spec.rotary.inv_freq[1] == pytest.approx(1e5 ** (-1 / 6) / 2)
    fields = {**NEOX, "num_attention_heads": 2, "rotary_pct": 0.25, "rotary_emb_base": 500}
    spec = describe_fields(folder_of(fields))
    assert spec.rotary.inv_freq == pytest.approx([1, 500 ** (-1 / 3), 500 ** (-2 / 3)])
    spec = describe_fields(folder_of({**BLOOM, "n_embed": 64, "hidden_size": 32}))
    assert spec.hidden_size == 64


def test_qwen2_has_a_window_per_layer(folder_of):
    fields = {**QWEN2, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    assert [block.window for block in describe_fields(folder_of(fields)).blocks] == [0, 7]
    fields["use_sliding_window"] = False
    assert [block.window for block in describe_fields(folder_of(fields)).blocks] == [0, 0]
    kinds = ["sliding_attention", "full_attention"]
    fields |= {"use_sliding_window": True, "layer_types": kinds}
    assert [block.window for block in describe_fields(folder_of(fields)).blocks] == [7, 0]


def test_positions_are_limited_where_frequencies_would_change(folder_of):
    longrope = {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6,
        "original_max_position_embeddings": 128,
    }
    fields = {**LLAMA, "max_position_embeddings": 512, "rope_scaling": longrope}
    assert describe_fields(folder_of(fields)).max_positions == 128
    fields["rope_scaling"] = {"rope_type": "dynamic", "factor": 4.0}
    assert describe_fields(folder_of(fields)).max_positions == 512
    assert describe_fields(folder_of(BLOOM)).max_positions is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/folder", "must be a folder or a hub id .* got 'no/such/folder'"),
        ("nowhere", "must be a folder or a hub id .* got 'nowhere'"),
        ("", "must be a folder or a hub id .* got ''"),
        ("./nowhere", "must be a folder or a hub id"),
    ],
)
def test_a_missing_folder_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        load_config(model)


def test_a_hub_id_out_of_reach_is_refused(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="can be reached, got 'no-such/model'") as error:
        load_config("no-such/model")
    assert "\n" not in str(error.value)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a config\.json, got none"):
        load_config(tmp_path)


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{model_type: llama}")
    with pytest.raises(ValueError, match=r"config\.json: must be JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", r"config\.json: must be a JSON object, got list"),
        ('{"model_type": "bloom", "n_layer": 2}', "hidden_size: must be an integer, got nothing"),
        ('{"model_type": "opt", "hidden_size": 64}', "num_hidden_layers: must be an integer"),
        (
            '{"model_type": "bloom", "hidden_size": 64, "n_layer": 1000000000}',
            "n_layer: must be an integer of 1 to 131072, got 1000000000",
        ),
        ('{"model_type": "llama", "hidden_size": -3, "num_hidden_layers": 2}', "got -3"),
    ],
)
def test_configs_without_usable_sizes_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize("fields", [{"model_type": "t5"}, {"hidden_size": 4}])
def test_unknown_family_lists_the_known_ones(folder_of, fields):
    with pytest.raises(ValueError, match="llama, mistral, qwen2, bloom, opt, gpt_neox"):
        load_config(folder_of(fields))


def test_code_of_a_model_is_never_run(folder_of, tmp_path):
    code = f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
    (tmp_path / "configuration_x.py").write_text(code)
    classes = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    describe_fields(folder_of({**LLAMA, "auto_map": classes}))
    with pytest.raises(ValueError, match="model_type"):
        load_config(folder_of({"model_type": "x", "auto_map": classes}))
    assert not (tmp_path / "executed").exists()


def test_a_field_of_a_wrong_type_is_named(folder_of):
    with pytest.raises(
        ValueError, match=r"num_attention_heads: must be an integer of 1 to 131072, got 'four'"
    ) as error:
        load_config(folder_of({**LLAMA, "num_attention_heads": "four"}))
    assert "num_attention_heads" in str(error.value)
    assert "\n" not in str(error.value)


REFUSED = {
    "quantization_config": (LLAMA, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "attn_logit_softcapping": (LLAMA, {"attn_logit_softcapping": 50.0}),
    "final_logit_softcapping": (LLAMA, {"final_logit_softcapping": 30.0}),
    "logit_scale": (LLAMA, {"logit_scale": 0.06}),
    "embedding_multiplier": (LLAMA, {"embedding_multiplier": 12.0}),
    "residual_multiplier": (LLAMA, {"residual_multiplier": 0.2}),
    "rope_interleaved": (LLAMA, {"rope_interleaved": True}),
    "clip_qkv": (LLAMA, {"clip_qkv": 8.0}),
    "use_qk_norm": (LLAMA, {"use_qk_norm": True}),
    "num_local_experts": (MISTRAL, {"num_local_experts": 8}),
    "is_encoder_decoder": (OPT, {"is_encoder_decoder": True}),
    "architectures": (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}),
    "hidden_act": (LLAMA, {"hidden_act": "gelu"}),
    "hidden_act ": (NEOX, {"hidden_act": "quick_gelu"}),
    "activation_function": (OPT, {"activation_function": "silu"}),
    "num_key_value_heads": (LLAMA, {"num_key_value_heads": 3}),
    "partial_rotary_factor": (
        LLAMA,
        {"partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    ),
    "rope_type": (LLAMA, {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}),
    "mrope_section": (QWEN2, {"rope_scaling": {"type": "default", "mrope_section": [2, 2, 2]}}),
    "rope_parameters": (
        QWEN2,
        {
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
    ),
    "rope_parameters ": (QWEN2, {"rope_parameters": [1e4]}),
    "layer_types": (QWEN2, {"layer_types": ["full_attention", "linear_attention"]}),
    "n_inner": (BLOOM, {"n_inner": 100}),
    "n_head": (BLOOM, {"n_head": 5}),
    "slow_but_exact": (BLOOM, {"slow_but_exact": True, "pretraining_tp": 4}),
    "head_dim": (NEOX, {"head_dim": 24}),
    "num_attention_heads": (OPT, {"num_attention_heads": 5}),
}


@pytest.mark.parametrize("key", REFUSED)
def test_features_without_an_implementation_are_refused(folder_of, key):
    fields, change = REFUSED[key]
    describe_fields(folder_of(fields))
    with pytest.raises(ValueError, match=f"config.json:.*{key.strip()}.*must ") as error:
        describe_fields(folder_of({**fields, **change}))
    assert "\n" not in str(error.value)


def test_fields_with_neutral_values_are_accepted(folder_of):
    neutral = {"logit_scale": 1.0, "residual_multiplier": 1, "num_experts": 0, "clip_qkv": None}
    describe_fields(folder_of({**LLAMA, **neutral, "sliding_window": None}))


def test_specs_are_plain_data(folder_of):
    one, two = describe_fields(folder_of(LLAMA)), describe_fields(folder_of(LLAMA))
    assert one == two
    assert hash(one) == hash(two)


def test_sources_are_those_of_the_stage_under_every_name(folder_of):
    spec = describe_fields(folder_of(LLAMA))
    sources = tensor_sources(spec, StageSlice(range(1, 2), first=False, last=True))
    assert not any(name.startswith(("embedding", "blocks.0.")) for name in sources)
    qkv = sources["blocks.1.qkv.weight"]
    assert qkv.names[0][0] == "model.layers.1.self_attn.q_proj.weight"
    assert qkv.names[0][1] == "layers.1.self_attn.q_proj.weight"
    assert qkv.shapes == ((48, 48), (24, 48), (24, 48))


@pytest.mark.parametrize(
    ("fields", "change", "warned"),
    [
        (LLAMA, {"sliding_window": 4096, "use_sliding_window": False}, ""),
        (LLAMA, {"sliding_window": 4096}, "sliding_window"),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (NEOX, {"sliding_window": 7}, "sliding_window"),
        (BLOOM, {"sliding_window": 7}, "sliding_window"),
    ],
)
def test_windows_of_families_without_any_are_ignored_as_in_transformers(
    folder_of, caplog, fields, change, warned
):
    plain = describe_fields(folder_of(fields))
    notice.warn_once.cache_clear()
    assert describe_fields(folder_of({**fields, **change})) == plain
    assert (f"{warned}: ignored" in caplog.text) if warned else not caplog.text


def test_a_mistral_has_its_window_whatever_its_layer_types_say(folder_of):
    fields = {**MISTRAL, "sliding_window": 5, "layer_types": ["full_attention"] * 2}
    assert [block.window for block in describe_fields(folder_of(fields)).blocks] == [5, 5]
