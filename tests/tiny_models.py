"""Small models of every family: their configs, loading, running and comparing them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from dist_int8.checkpoint import (
    StageFormat,
    find_hot_columns,
    load_stage,
    make_calibration,
)
from dist_int8.models import (
    DecoderStage,
    ModelSpec,
    StageSlice,
    TokenBatch,
    describe,
    load_config,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# Families' own names of sizes; None: the family has no such field.
_NAMES: dict[str, dict[str, str | None]] = {
    "bloom": {
        "intermediate_size": None,
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": None,
    },
    "opt": {"intermediate_size": "ffn_dim"},
}


def make_config(family: str, **changes: Any) -> PretrainedConfig:
    """Make a config of a family.

    Args:
        family: transformers' model_type.
        changes: fields, the sizes by their names in `SIZES`; those that a family lacks are left
            out.
    """
    names = _NAMES.get(family, {})
    fields = {names.get(key, key): value for key, value in {**SIZES, **changes}.items()}
    fields.pop(None, None)
    return CONFIG_MAPPING[family](**fields)


def read_spec(folder: Path) -> ModelSpec:
    """Describe the model of a folder."""
    return describe(load_config(folder))


def load_tiny_stage(
    folder: Path, stage_slice: StageSlice | None = None, **options: Any
) -> DecoderStage:
    """Load a stage; None: one that holds the whole model.

    Args:
        folder: of the model.
        stage_slice: the part of the model.
        options: fields of `StageFormat`, and options of `load_stage`.
    """
    spec = read_spec(folder)
    fields = {key: options.pop(key) for key in list(options) if key in _FORMAT_FIELDS}
    whole = StageSlice.whole(spec)
    return load_stage(folder, spec, stage_slice or whole, StageFormat(**fields), **options)


_FORMAT_FIELDS = set(StageFormat.__dataclass_fields__)


def assert_same_stage(stage: DecoderStage, other: DecoderStage) -> None:
    """Assert that two stages hold the same tensors under the same names."""
    one, two = stage.state_dict(), other.state_dict()
    assert sorted(one) == sorted(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def find_tiny_columns(
    folder: Path, num_hot_columns: int = 16, stage_slice: StageSlice | None = None, **options: Any
) -> dict[str, list[int]]:
    """Find hot columns with random tokens; None: of every block, not of the head."""
    spec = read_spec(folder)
    calibration = make_calibration(folder, spec, "random", num_hot_columns)
    return find_hot_columns(folder, spec, calibration, stage_slice, **options)


class OneSequenceCaches:
    """KV cache of one sequence in every block of a model."""

    def __init__(self, spec: ModelSpec, num_tokens: int = 64) -> None:
        block = spec.blocks[0]
        shape = (1, block.num_kv_heads, block.head_dim, num_tokens)
        self._layers = [
            (torch.zeros(shape), torch.zeros(shape).transpose(2, 3).contiguous())
            for _ in spec.blocks
        ]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._layers[index]


@torch.inference_mode()
def compute_logits(stage: DecoderStage, ids: Tensor) -> Tensor:
    """Compute the logits [tokens, vocab] of one sequence by a stage that holds the whole model."""
    batch = TokenBatch.from_segments(ids, [(0, 0, len(ids))])
    return stage(batch, None, OneSequenceCaches(stage.spec))


def tensors_of(stage):
    """Tensors that a stage holds, weights row-major; its state dict says rotations beside them."""
    state = stage.state_dict()
    return [tensor for name, tensor in state.items() if not name.endswith(".rotation")]
