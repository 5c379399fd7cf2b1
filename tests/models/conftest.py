"""Small random models of every family, made and saved by transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

VOCAB = 97
MAX_POSITIONS = 64


def _llama(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
    }
    return LlamaConfig(**{**sizes, **changes})


def _mistral(**changes: Any) -> MistralConfig:
    return MistralConfig(**{**_sizes_of(_llama()), "num_key_value_heads": 2, **changes})


def _qwen2(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**{**_sizes_of(_llama()), "num_key_value_heads": 2, **changes})


def _sizes_of(config: PretrainedConfig) -> dict[str, Any]:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    more = ("num_attention_heads", "max_position_embeddings")
    return {key: getattr(config, key) for key in keys + more}


def _bloom(**changes: Any) -> BloomConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 3, "n_head": 4}
    return BloomConfig(**{**sizes, **changes})


def _opt(**changes: Any) -> OPTConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "ffn_dim": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
    }
    return OPTConfig(**{**sizes, **changes})


def _neox(**changes: Any) -> GPTNeoXConfig:
    return GPTNeoXConfig(**{**_sizes_of(_llama()), "rotary_pct": 0.5, **changes})


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
    "llama": _llama(),
    "llama_grouped_tied": _llama(
        num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "llama_wide_heads": _llama(num_attention_heads=3, num_key_value_heads=3, head_dim=32),
    "llama_one_kv_head_biases": _llama(
        num_attention_heads=3, num_key_value_heads=1, attention_bias=True, mlp_bias=True
    ),
    "llama_rope_theta": _llama(**_rope("default", rope_theta=500.0)),
    "llama_rope_linear": _llama(**_rope("linear", factor=2.0)),
    "llama_rope_llama3": _llama(**_LLAMA3),
    "llama_rope_yarn": _llama(**_rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama_rope_dynamic": _llama(**_rope("dynamic", factor=2.0)),
    "llama_rope_longrope": _llama(**_LONGROPE),
    "mistral": _mistral(sliding_window=None),
    "mistral_window": _mistral(sliding_window=4),
    "qwen2": _qwen2(),
    "qwen2_window": _qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "bloom": _bloom(),
    "bloom_three_heads": _bloom(n_head=3),
    "bloom_six_heads": _bloom(n_head=6),
    "bloom_residual_from_norm": _bloom(apply_residual_connection_post_layernorm=True),
    "bloom_untied": _bloom(tie_word_embeddings=False),
    "opt": _opt(),
    "opt_350m": _opt(**_350M),
    "opt_350m_untied": _opt(**_350M, tie_word_embeddings=False),
    "opt_without_biases": _opt(enable_bias=False, num_attention_heads=6),
    "opt_plain_norms": _opt(layer_norm_elementwise_affine=False),
    "opt_without_final_norm": _opt(_remove_final_layer_norm=True),
    "opt_gelu": _opt(activation_function="gelu_new"),
    "gpt_neox": _neox(),
    "gpt_neox_sequential": _neox(use_parallel_residual=False),
    "gpt_neox_whole_rotary": _neox(rotary_pct=1.0, num_attention_heads=3),
    "gpt_neox_without_biases": _neox(attention_bias=False, tie_word_embeddings=True),
    "gpt_neox_rope_linear": _neox(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
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
