"""Bytes: against transformers' and our own models without weights, and BLOOM-176B to the byte."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from tiny_models import make_config
from transformers import AutoModelForCausalLM

from dist_int8.int8.convert import swap_linears
from dist_int8.int8.linear import Int8Linear
from dist_int8.models import DecoderStage, StageSlice, describe, load_config
from dist_int8.partition import memory
from dist_int8.partition.memory import Formats

SHAPES = Path(__file__).parents[2] / "configs" / "models"
NAMES = sorted(path.name for path in SHAPES.iterdir())
INT8 = Formats(int8=True, float_size=2, vocab_size=2)
COUNT = Formats(int8=False, float_size=1, vocab_size=1)  # one "byte" per parameter

CONFIGS = {name: make_config(name, num_key_value_heads=2) for name in ("mistral", "qwen2")}


def changed(name, **fields):
    config = load_config(SHAPES / name)
    for key, value in fields.items():
        setattr(config, key, value)
    return config


CONFIGS |= {
    "llama with biases": changed("llama-3-8b", attention_bias=True, mlp_bias=True),
    "llama tied": changed("llama-3-8b", tie_word_embeddings=True),
    "bloom untied": changed("bloom-560m", tie_word_embeddings=False),
    "opt without biases": changed("opt-125m", enable_bias=False),
    "neox without biases": changed("gpt-neox-20b", attention_bias=False),
}
CONFIGS |= {name: load_config(SHAPES / name) for name in NAMES}


def held_bytes(stage):
    """Bytes of a stage's parameters and int8 buffers, each storage once."""
    return sum(t.numel() * t.element_size() for t in stage.state_dict().values())


@pytest.mark.parametrize("name", CONFIGS)
def test_model_bytes_equal_transformers_parameters(name):
    config = CONFIGS[name]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert memory.model_bytes(describe(config), COUNT) == expected


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("int8", "skip"),
    [(True, ("lm_head",)), (True, ()), (False, ()), (True, ("lm_head", "down", "blocks.1"))],
)
def test_stage_bytes_equal_those_of_loaded_stages(name, int8, skip):
    spec = describe(CONFIGS[name])
    half = spec.num_blocks // 2
    formats = Formats(int8, 2, 2, skip=skip)
    formats = replace(formats, head_int8=formats.is_int8("lm_head"))
    for part in (
        StageSlice(range(half), first=True, last=False),
        StageSlice(range(half, spec.num_blocks), first=False, last=True),
    ):
        stage = DecoderStage.empty(spec, part, torch.float16, 64)
        if int8:
            swap_linears(stage, skip=skip)
        ends = {"first": part.first, "last": part.last}
        counted = memory.stage_weight_bytes(spec, part.blocks, formats, **ends)
        assert counted == held_bytes(stage)


def test_hot_columns_count_their_weights_and_indices():
    spec = describe(CONFIGS["llama-3-8b"])
    block = spec.blocks[0]
    formats = replace(INT8, num_hot_columns=16)
    extra = memory.block_bytes(block, formats) - memory.block_bytes(block, INT8)
    layers = [
        Int8Linear(
            linear.num_inputs,
            linear.num_outputs,
            linear.bias,
            hot_columns=range(hot) if hot else None,
            device="meta",
            dtype=torch.float16,
        )
        for linear in memory.block_linears(block)
        for hot in (16, 0)
    ]
    only_down = replace(INT8, down_hot_columns=64)
    extra_down = memory.block_bytes(block, only_down) - memory.block_bytes(block, INT8)
    assert extra_down == 64 * (block.hidden_size * 2 + 4)
    held = [held_bytes(layer) for layer in layers]
    assert extra == sum(held[0::2]) - sum(held[1::2])
    head = memory.head_bytes(spec, replace(formats, head_int8=True))
    assert head - memory.head_bytes(spec, replace(INT8, head_int8=True)) == 16 * (128_256 * 2 + 4)
    own = replace(formats, head_int8=True, head_hot_columns=0)
    assert memory.head_bytes(spec, own) == memory.head_bytes(spec, replace(INT8, head_int8=True))


def test_bloom_176b_matches_hand_computed_bytes():
    spec = describe(CONFIGS["bloom-176b"])
    assert memory.block_bytes(spec.blocks[0], INT8) == 2_467_139_584
    assert memory.model_bytes(spec, INT8) == 179_893_116_928
    assert memory.kv_bytes_per_token(spec.blocks[0], 2) * 70 == 4_014_080
    assert memory.kv_bytes_per_token(spec.blocks[0], 2, int8=True) * 70 == 2_069_760
    tables = replace(INT8, embedding_int8=True, head_int8=True)
    assert memory.vocab_bytes(spec, tables, int8=True) == 3_597_619_200
    # an int8 head cannot share the table of a 16-bit embedding
    assert memory.shared_bytes(spec, replace(INT8, head_int8=True)) == 0
    # nor one with hot columns that of an int8 embedding
    assert memory.shared_bytes(spec, tables) == 3_597_619_200
    assert memory.shared_bytes(spec, replace(tables, num_hot_columns=16)) == 0
    # nor a rotated one
    assert memory.shared_bytes(spec, replace(tables, rotated=True)) == 0


# Numbers of parameters that the models' cards and papers name.
PUBLISHED = {
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "gpt-neox-20b": 20_554_567_680,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", NAMES)
def test_model_configs_have_published_sizes(name):
    count = memory.model_bytes(describe(CONFIGS[name]), COUNT)
    if name in PUBLISHED:
        assert count == PUBLISHED[name]
    else:  # the name says it, rounded (bloom and llama names round down)
        size = name.rsplit("-", 1)[1]
        billions = float(size[:-1]) / (1000 if size.endswith("m") else 1)
        assert count / 1e9 == pytest.approx(billions, rel=0.09)
    fields = json.loads((SHAPES / name / "config.json").read_text())
    assert fields["dtype"] in ("float16", "bfloat16")
