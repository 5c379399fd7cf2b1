"""GPT-NeoX: parallel or sequential residual, partial rotary, fused qkv interleaved by head."""

from typing import Any

from dist_int8.models.families.activations import translate_activation
from dist_int8.models.rotary import describe_rotary
from dist_int8.models.sources import TensorSource, linear, norm, tensor
from dist_int8.models.spec import BlockSpec, ModelSpec

MODEL_TYPES = ("gpt_neox",)
PREFIX = "gpt_neox."
# Causal masks and rotary frequencies that old checkpoints saved as buffers.
IGNORED = (r"attention\.bias$", r"attention\.masked_bias$", r"rotary_emb\.inv_freq$")


def describe(config: Any) -> ModelSpec:
    """Describes a GPT-NeoX config as a `ModelSpec`."""
    hidden, num_heads = config.hidden_size, config.num_attention_heads
    head_dim = hidden // num_heads
    if getattr(config, "head_dim", None) not in (None, head_dim):
        raise ValueError(
            "config.json:head_dim: must be absent or hidden_size / num_attention_heads = "
            f"{head_dim}, got {config.head_dim}; GPT-NeoX has no separate head size"
        )
    rotary, max_positions = describe_rotary(config, head_dim, config.max_position_embeddings)
    block = BlockSpec(
        hidden_size=hidden,
        intermediate_size=config.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        activation=translate_activation("hidden_act", config.hidden_act),
        qkv_bias=bool(config.attention_bias),
        attention_output_bias=bool(config.attention_bias),
        mlp_bias=True,
        parallel_residual=bool(config.use_parallel_residual),
    )
    return ModelSpec(
        family="gpt_neox",
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        embedding_size=hidden,
        blocks=(block,) * config.num_hidden_layers,
        tied_head=bool(config.tie_word_embeddings),
        max_positions=max_positions,
        rotary=rotary,
    )


def edge_sources(spec: ModelSpec) -> dict[str, TensorSource]:
    """Describes the checkpoint tensors outside the blocks."""
    table = (spec.vocab_size, spec.hidden_size)
    return {
        "embedding.weight": tensor("gpt_neox.embed_in.weight", *table),
        **norm("final_norm", "gpt_neox.final_layer_norm", spec.hidden_size),
        "lm_head.weight": TensorSource((("embed_out.weight", "lm_head.weight"),), (table,)),
    }


def block_sources(spec: ModelSpec, index: int) -> dict[str, TensorSource]:
    """Describes the checkpoint tensors of block `index`."""
    block = spec.blocks[index]
    base = f"gpt_neox.layers.{index}"
    hidden, inner = block.hidden_size, block.intermediate_size
    return {
        **norm("attention_norm", f"{base}.input_layernorm", hidden),
        **linear(
            "qkv",
            (f"{base}.attention.query_key_value",),
            (block.qkv_size,),
            hidden,
            block.qkv_bias,
            row_order="interleaved_qkv",
            num_heads=block.num_heads,
        ),
        **linear(
            "attention_output",
            (f"{base}.attention.dense",),
            (hidden,),
            hidden,
            block.attention_output_bias,
        ),
        **norm("mlp_norm", f"{base}.post_attention_layernorm", hidden),
        **linear("up", (f"{base}.mlp.dense_h_to_4h",), (inner,), hidden, True),
        **linear("down", (f"{base}.mlp.dense_4h_to_h",), (hidden,), inner, True),
    }
