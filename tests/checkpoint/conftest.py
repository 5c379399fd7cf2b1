"""Small random models of four families, saved by transformers; tests may damage copies."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import make_config
from transformers import AutoModelForCausalLM

_CONFIGS = {
    "llama": make_config("llama", intermediate_size=80, num_key_value_heads=2),
    "llama_tied": make_config("llama", intermediate_size=80, tie_word_embeddings=True),
    "bloom": make_config("bloom", num_hidden_layers=2),
    "opt": make_config(
        "opt",
        intermediate_size=80,
        num_hidden_layers=2,
        word_embed_proj_dim=24,
        do_layer_norm_before=False,
    ),
    "gpt_neox": make_config("gpt_neox", intermediate_size=80, num_hidden_layers=2),
}


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the saved models; do not write there."""
    folders = {}
    for name, config in _CONFIGS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
    return folders


@pytest.fixture
def folder_of(originals: dict[str, Path], tmp_path: Path):
    """A function: name of a model -> a copy of its folder that a test may damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(originals[name], tmp_path / name))

    return copy
