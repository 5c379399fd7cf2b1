"""configs/: the deployments that name GPUs fit the memory they name, by our own count of bytes."""

from pathlib import Path

import pytest
from transformers import BloomConfig, OPTConfig

from dist_int8.config import load_settings
from dist_int8.models import describe
from dist_int8.partition import memory, plan_stages

CONFIGS = Path(__file__).parents[1] / "configs"

# Sizes as published on the models' cards.
SHAPES = {
    "bloom-176b-4xa100-80gb.yaml": (
        BloomConfig(vocab_size=250880, hidden_size=14336, n_layer=70, n_head=112),
        176.2e9,
    ),
    "opt-66b-2xa100-80gb.yaml": (
        OPTConfig(
            vocab_size=50272,
            hidden_size=9216,
            ffn_dim=36864,
            num_hidden_layers=64,
            num_attention_heads=72,
            word_embed_proj_dim=9216,
            max_position_embeddings=2048,
        ),
        65.7e9,
    ),
}


def plan(name, int8=True):
    config, _ = SHAPES[name]
    settings = load_settings(CONFIGS / name)
    devices = [f"cuda:{index}" for index in range(settings.gpus)]
    budgets = [settings.budget_of(rank, device) for rank, device in enumerate(devices)]
    formats = memory.Formats(int8=int8, float_size=2, vocab_size=2)
    return plan_stages(
        describe(config),
        devices,
        formats,
        num_slots=settings.max_sequences,
        max_tokens=settings.max_tokens,
        budgets=budgets,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_fits_in_int8_and_not_in_16_bits(name):
    stages = plan(name).stages
    assert all(stage.weight_bytes + stage.kv_bytes <= stage.budget for stage in stages)
    # fp32 bytes of all stages: the parameters, the tied embedding counted on both ends
    num_parameters = sum(stage.float_bytes for stage in stages) / 4
    config, published = SHAPES[name]
    assert num_parameters == pytest.approx(
        published + config.vocab_size * config.hidden_size, rel=0.01
    )
    with pytest.raises(ValueError, match="must fit"):
        plan(name, int8=False)
