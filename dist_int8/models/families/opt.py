"""OPT: learned positions with an offset of 2, ReLU, the 350m variant (post-norm, projections)."""

from typing import Any

from dist_int8.models.families.activations import translate_activation
from dist_int8.models.sources import TensorSource, linear, norm, tensor
from dist_int8.models.spec import BlockSpec, ModelSpec

MODEL_TYPES = ("opt",)
PREFIX = "model."
IGNORED = (r"^decoder\.version$", r"^model\.decoder\.version$")
_POSITION_OFFSET = 2  # the first two rows of the position table are unused


def describe(config: Any) -> ModelSpec:
    """Describes an OPT config as a `ModelSpec`."""
    hidden, num_heads = config.hidden_size, config.num_attention_heads
    if hidden % num_heads:
        raise ValueError(
            f"config.json:num_attention_heads: must divide hidden_size {hidden}, got {num_heads}; "
            "check the config"
        )
    bias = bool(config.enable_bias)
    norm_after = not config.do_layer_norm_before
    block = BlockSpec(
        hidden_size=hidden,
        intermediate_size=config.ffn_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden // num_heads,
        norm="layer",
        norm_eps=1e-5,  # torch's LayerNorm default: OPT's config has no such field
        norm_affine=bool(config.layer_norm_elementwise_affine),
        activation=translate_activation("activation_function", config.activation_function),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        norm_after=norm_after,
    )
    return ModelSpec(
        family="opt",
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        embedding_size=config.word_embed_proj_dim,
        blocks=(block,) * config.num_hidden_layers,
        tied_head=bool(config.tie_word_embeddings),
        max_positions=config.max_position_embeddings,
        num_position_rows=config.max_position_embeddings + _POSITION_OFFSET,
        position_offset=_POSITION_OFFSET,
        final_norm=not norm_after and not config._remove_final_layer_norm,
    )


def edge_sources(spec: ModelSpec) -> dict[str, TensorSource]:
    """Describes the checkpoint tensors outside the blocks."""
    vocab, hidden, narrow = spec.vocab_size, spec.hidden_size, spec.embedding_size
    base = "model.decoder"
    sources = {
        "embedding.weight": tensor(f"{base}.embed_tokens.weight", vocab, narrow),
        "positions.weight": tensor(
            f"{base}.embed_positions.weight", spec.num_position_rows, hidden
        ),
        "lm_head.weight": tensor("lm_head.weight", vocab, narrow),
    }
    if spec.has_projections:
        sources["project_in.weight"] = tensor(f"{base}.project_in.weight", hidden, narrow)
        sources["project_out.weight"] = tensor(f"{base}.project_out.weight", narrow, hidden)
    if spec.final_norm:
        affine = spec.blocks[0].norm_affine
        sources.update(norm("final_norm", f"{base}.final_layer_norm", hidden, affine))
    return sources


def block_sources(spec: ModelSpec, index: int) -> dict[str, TensorSource]:
    """Describes the checkpoint tensors of block `index`."""
    block = spec.blocks[index]
    base = f"model.decoder.layers.{index}"
    attention = f"{base}.self_attn"
    hidden, inner, affine = block.hidden_size, block.intermediate_size, block.norm_affine
    return {
        **norm("attention_norm", f"{base}.self_attn_layer_norm", hidden, affine),
        **linear(
            "qkv",
            (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
            (hidden, hidden, hidden),
            hidden,
            block.qkv_bias,
        ),
        **linear(
            "attention_output",
            (f"{attention}.out_proj",),
            (hidden,),
            hidden,
            block.attention_output_bias,
        ),
        **norm("mlp_norm", f"{base}.final_layer_norm", hidden, affine),
        **linear("up", (f"{base}.fc1",), (inner,), hidden, block.mlp_bias),
        **linear("down", (f"{base}.fc2",), (hidden,), inner, block.mlp_bias),
    }
