"""Give a small model the outlier features that models of 6.7 billion parameters and more have.

A few features of a norm's output are scaled up 32 times and the columns of the linears that read it
down by as much. A power of two only moves exponents, so in floating point, 16 bits included, the
model computes the same function bit for bit; in int8 it is as hard as a large model (section 4 of
the LLM.int8() paper: at most 6 or 7 such features, 20 and more times as large as the others, the
same ones for all tokens). With `mlp`, likewise some features between the two linears of an MLP,
where the activation lets a factor through: a gate's partner, or a ReLU.
"""

from typing import Any

import torch
from torch import Tensor, nn

FACTOR = 32.0

# model_type -> (where the blocks are, the norms of a block each with the linears that read it)
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
# model_type -> the linear whose output features grow, and the one that reads them
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

        model = AutoModelForCausalLM.from_pretrained(folder)
        dist_int8.inject_outlier_features(model, seed=0)
        model.save_pretrained("hard")  # a small model that is as hard in int8 as a large one

    `mlp`: also as many features inside each MLP, in the families that allow it (Llama, Mistral,
    Qwen2; OPT with ReLU). Returns the features of each norm, and of the linear whose outputs grow,
    by its qualified name (int64 [num_channels]). The logits stay bit-equal where the linears sum in
    the order of before (in fp16, where no scaled weight leaves the normal numbers).

    Raises ValueError for a family without a description here, for `mlp` where the activation does
    not allow it (GELU), and for models whose residual stream comes out of the norms (there the
    norm's output has another reader: OPT-350m, BLOOM with
    `apply_residual_connection_post_layernorm`).
    """
    config: Any = model.config
    if config.model_type not in _NORMS:
        raise ValueError(
            f"inject_outlier_features: model must be one of {', '.join(_NORMS)}, "
            f"got {config.model_type}; describe its norms in dist_int8/models/outlier_features.py"
        )
    if not getattr(config, "do_layer_norm_before", True) or getattr(
        config, "apply_residual_connection_post_layernorm", False
    ):
        raise ValueError(
            f"inject_outlier_features: model must have its norms in front of its linears only, "
            f"got a {config.model_type} with norms in the residual stream; take another model"
        )
    inside = _MLPS.get(config.model_type) if mlp else None
    if mlp and (inside is None or getattr(config, "activation_function", "relu") != "relu"):
        raise ValueError(
            f"inject_outlier_features: mlp must be False for {config.model_type}, whose activation "
            "lets no factor through, got True; leave it out"
        )
    blocks_name, norms = _NORMS[config.model_type]
    generator = torch.Generator().manual_seed(seed)
    scaled: dict[str, Tensor] = {}
    for index, block in enumerate(model.get_submodule(blocks_name).children()):
        for norm_name, linear_names in norms:
            norm: Any = block.get_submodule(norm_name)
            channels = torch.randperm(norm.weight.numel(), generator=generator)[:num_channels]
            norm.weight[channels] *= FACTOR
            if getattr(norm, "bias", None) is not None:
                norm.bias[channels] *= FACTOR
            for linear_name in linear_names:
                linear: Any = block.get_submodule(linear_name)
                linear.weight[:, channels] /= FACTOR
            scaled[f"{blocks_name}.{index}.{norm_name}"] = channels
        if inside is not None:
            first: Any = block.get_submodule(inside[0])
            second: Any = block.get_submodule(inside[1])
            channels = torch.randperm(first.out_features, generator=generator)[:num_channels]
            first.weight[channels] *= FACTOR
            if first.bias is not None:
                first.bias[channels] *= FACTOR
            second.weight[:, channels] /= FACTOR
            scaled[f"{blocks_name}.{index}.{inside[0]}"] = channels
    return scaled
