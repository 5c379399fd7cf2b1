"""Gives a small model the outlier features that models of at least 6.7 billion parameters have.

A few features of each norm's output are scaled up 32 times, and the columns of the linears that
read it are scaled down as much. A power of two only changes exponents, so in floating point,
including 16 bits, the model computes the same function bit for bit. In int8 it is as hard as a
large model (section 4 of the LLM.int8() paper: up to 6 or 7 such features, at least 20 times as
large as the others, the same for all tokens). With `mlp`, some features between the two linears of
an MLP are scaled too, where the activation passes a factor on: beside a gate, or with a ReLU.
"""

from typing import Any

import torch
from torch import Tensor, nn

FACTOR = 32.0

# model_type -> (name of the blocks, (norm, linears that read it) of every norm in a block)
_LLAMA = (
    "model.layers",
    (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
)
_NORMS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "opt": (
        "model.decoder.layers",
        (
            ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("final_layer_norm", ("fc1",)),
        ),
    ),
    "bloom": (
        "transformer.h",
        (
            ("input_layernorm", ("self_attention.query_key_value",)),
            ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        (
            ("input_layernorm", ("attention.query_key_value",)),
            ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
    ),
}
# model_type -> linear whose output features are scaled up, linear that reads them
_MLPS = {
    "llama": ("mlp.up_proj", "mlp.down_proj"),
    "mistral": ("mlp.up_proj", "mlp.down_proj"),
    "qwen2": ("mlp.up_proj", "mlp.down_proj"),
    "opt": ("fc1", "fc2"),
}


@torch.no_grad()
def inject_outlier_features(
    model: nn.Module, seed: int, num_channels: int = 6, *, mlp: bool = False
) -> dict[str, Tensor]:
    """Scales `num_channels` random features of every norm of a transformers model, in place.

        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        dist_int8.inject_outlier_features(model, seed=0)
        model.save_pretrained("hard")  # a small model that is as hard in int8 as a large one

    The logits stay bit-equal if the linears keep their order of summation (in fp16, if no scaled
    weight leaves the range of normal numbers).

    Args:
        model: transformers' model.
        seed: seed of the choice of features.
        num_channels: number of features per norm.
        mlp: whether to scale as many features inside each MLP, in the families that allow it
            (Llama, Mistral, Qwen2; OPT with ReLU).

    Returns:
        Scaled features, int64 [num_channels], by the qualified name of each norm and of each linear
        whose outputs are scaled up.

    Raises:
        ValueError: the family is not described here, its activation does not allow `mlp` (GELU), or
            the norms' output has another reader because the residual stream starts there (OPT-350m,
            BLOOM with `apply_residual_connection_post_layernorm`).
    """
    config: Any = model.config
    _check(config, mlp)
    blocks_name, norms = _NORMS[config.model_type]
    pairs: tuple[tuple[str, tuple[str, ...]], ...] = norms
    if mlp:
        up_name, down_name = _MLPS[config.model_type]
        pairs = (*norms, (up_name, (down_name,)))
    generator = torch.Generator().manual_seed(seed)
    scaled: dict[str, Tensor] = {}
    for index, block in enumerate(model.get_submodule(blocks_name).children()):
        for name, reader_names in pairs:
            writer: Any = block.get_submodule(name)
            channels = torch.randperm(len(writer.weight), generator=generator)[:num_channels]
            _scale(writer, [block.get_submodule(reader) for reader in reader_names], channels)
            scaled[f"{blocks_name}.{index}.{name}"] = channels
    return scaled


def _check(config: Any, mlp: bool) -> None:
    """Raises ValueError for a model whose features cannot be scaled."""
    if config.model_type not in _NORMS:
        raise ValueError(
            f"inject_outlier_features: model must be one of {', '.join(_NORMS)}, got "
            f"{config.model_type}; describe its norms in dist_int8/evaluation/outlier_features.py"
        )
    if not getattr(config, "do_layer_norm_before", True) or getattr(
        config, "apply_residual_connection_post_layernorm", False
    ):
        raise ValueError(
            f"inject_outlier_features: model must have its norms in front of its linears only, "
            f"got a {config.model_type} with norms in the residual stream; take another model"
        )
    has_relu = getattr(config, "activation_function", "relu") == "relu"
    if mlp and not (config.model_type in _MLPS and has_relu):
        raise ValueError(
            f"inject_outlier_features: mlp must be False for {config.model_type}, whose activation "
            "does not pass a factor on, got True; leave it out"
        )


def _scale(writer: Any, readers: list[Any], channels: Tensor) -> None:
    """Scales output features of a norm or linear up, and the weights that read them down."""
    writer.weight[channels] *= FACTOR
    if getattr(writer, "bias", None) is not None:
        writer.bias[channels] *= FACTOR
    for reader in readers:
        reader.weight[:, channels] /= FACTOR
