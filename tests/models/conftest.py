"""Small random models of every family, made and saved by transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_config
from transformers import AutoModelForCausalLM, PretrainedConfig


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_LLAMA3 = _rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
_LONGROPE = _rope(
    "longrope",
    factor=2.0,
    short_factor=[1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    long_factor=[2.0, 2.1, 2.3, 2.7, 3.0, 3.5],
    original_max_position_embeddings=32,
)
_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 24}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": make_config("llama"),
    "llama_grouped_tied": make_config(
        "llama", num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "llama_wide_heads": make_config(
        "llama", num_attention_heads=3, num_key_value_heads=3, head_dim=32
    ),
    "llama_one_kv_head_biases": make_config(
        "llama", num_attention_heads=3, num_key_value_heads=1, attention_bias=True, mlp_bias=True
    ),
    "llama_rope_theta": make_config("llama", **_rope("default", rope_theta=500.0)),
    "llama_rope_linear": make_config("llama", **_rope("linear", factor=2.0)),
    "llama_rope_llama3": make_config("llama", **_LLAMA3),
    "llama_rope_yarn": make_config(
        "llama", **_rope("yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "llama_rope_dynamic": make_config("llama", **_rope("dynamic", factor=2.0)),
    "llama_rope_longrope": make_config("llama", **_LONGROPE),
    "llama_partial_rotary": make_config("llama", partial_rotary_factor=0.5),
    "mistral": make_config("mistral", num_key_value_heads=2, sliding_window=None),
    "mistral_window": make_config("mistral", num_key_value_heads=2, sliding_window=4),
    "qwen2": make_config("qwen2", num_key_value_heads=2),
    "qwen2_window": make_config(
        "qwen2",
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "bloom": make_config("bloom"),
    "bloom_three_heads": make_config("bloom", num_attention_heads=3),
    "bloom_six_heads": make_config("bloom", num_attention_heads=6),
    "bloom_residual_from_norm": make_config("bloom", apply_residual_connection_post_layernorm=True),
    "bloom_untied": make_config("bloom", tie_word_embeddings=False),
    "opt": make_config("opt"),
    "opt_350m": make_config("opt", **_350M),
    "opt_350m_untied": make_config("opt", **_350M, tie_word_embeddings=False),
    "opt_without_biases": make_config("opt", enable_bias=False, num_attention_heads=6),
    "opt_plain_norms": make_config("opt", layer_norm_elementwise_affine=False),
    "opt_without_final_norm": make_config("opt", _remove_final_layer_norm=True),
    "opt_gelu": make_config("opt", activation_function="gelu_new"),
    "gpt_neox": make_config("gpt_neox", rotary_pct=0.5),
    "gpt_neox_sequential": make_config("gpt_neox", rotary_pct=0.5, use_parallel_residual=False),
    "gpt_neox_whole_rotary": make_config("gpt_neox", rotary_pct=1.0, num_attention_heads=3),
    "gpt_neox_without_biases": make_config(
        "gpt_neox", rotary_pct=0.5, attention_bias=False, tie_word_embeddings=True
    ),
    "gpt_neox_rope_linear": make_config(
        "gpt_neox",
        rotary_pct=0.5,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    ),
}


@dataclass(frozen=True)
class SavedModel:
    """A model of transformers and the folder it was saved to."""

    folder: Path
    model: torch.nn.Module

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """transformers' logits [tokens, vocab] of one sequence, without a cache."""
        with torch.no_grad():
            return self.model(torch.tensor([token_ids]), use_cache=False).logits[0]


def make_model(config: PretrainedConfig, folder: Path) -> SavedModel:
    """A random model in which every parameter matters: no zero bias, no norm weight of one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
            if "norm" in name or "ln_f" in name:
                parameter.add_(name.endswith("weight"))
    model.save_pretrained(folder)
    return SavedModel(folder, model)


_saved: dict[str, SavedModel] = {}


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory):
    """A function: name in CONFIGS -> SavedModel, each made once."""

    def get(name: str) -> SavedModel:
        if name not in _saved:
            _saved[name] = make_model(CONFIGS[name], tmp_path_factory.mktemp(name))
        return _saved[name]

    return get


@pytest.fixture(scope="session")
def config_names() -> list[str]:
    """Names of all models."""
    return list(CONFIGS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `every_model` runs once for each model."""
    if "every_model" in metafunc.fixturenames:
        metafunc.parametrize("every_model", list(CONFIGS))
