"""BLOOM: ALiBi, embedding LayerNorm, query-key-value rows interleaved by head, tied head."""

from typing import Any

from dist_int8.models.sources import TensorSource, linear, norm, tensor
from dist_int8.models.spec import BlockSpec, ModelSpec

MODEL_TYPES = ("bloom",)
PREFIX = "transformer."
IGNORED = ()


def describe(config: Any) -> ModelSpec:
    """Describes a BLOOM config as a `ModelSpec`."""
    _check(config)
    hidden, num_heads = config.hidden_size, config.n_head
    block = BlockSpec(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden // num_heads,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        activation="bloom_gelu",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        residual_from_norm=bool(config.apply_residual_connection_post_layernorm),
    )
    return ModelSpec(
        family="bloom",
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        embedding_size=hidden,
        blocks=(block,) * config.n_layer,
        tied_head=bool(config.tie_word_embeddings),
        max_positions=None,
        alibi=True,
        embedding_norm=True,
    )


def _check(config: Any) -> None:
    hidden, num_heads = config.hidden_size, config.n_head
    if hidden % num_heads:
        raise ValueError(
            f"config.json:n_head: must divide hidden_size {hidden}, got {num_heads}; check the "
            "config"
        )
    inner = getattr(config, "n_inner", None)
    if inner not in (None, 4 * hidden):
        raise ValueError(
            f"config.json:n_inner: must be absent or 4 * hidden_size = {4 * hidden}, got {inner}; "
            "transformers' BLOOM has no other MLP width"
        )
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise ValueError(
            "config.json:slow_but_exact: must be false, got true; the sliced products it asks for "
            "are not supported, set it to false"
        )


def edge_sources(spec: ModelSpec) -> dict[str, TensorSource]:
    """Describes the checkpoint tensors outside the blocks."""
    vocab, hidden = spec.vocab_size, spec.hidden_size
    return {
        "embedding.weight": tensor("transformer.word_embeddings.weight", vocab, hidden),
        **norm("embedding_norm", "transformer.word_embeddings_layernorm", hidden),
        **norm("final_norm", "transformer.ln_f", hidden),
        "lm_head.weight": tensor("lm_head.weight", vocab, hidden),
    }


def block_sources(spec: ModelSpec, index: int) -> dict[str, TensorSource]:
    """Describes the checkpoint tensors of block `index`."""
    block = spec.blocks[index]
    base = f"transformer.h.{index}"
    hidden, inner = block.hidden_size, block.intermediate_size
    return {
        **norm("attention_norm", f"{base}.input_layernorm", hidden),
        **linear(
            "qkv",
            (f"{base}.self_attention.query_key_value",),
            (block.qkv_size,),
            hidden,
            True,
            row_order="interleaved_qkv",
            num_heads=block.num_heads,
        ),
        **linear("attention_output", (f"{base}.self_attention.dense",), (hidden,), hidden, True),
        **norm("mlp_norm", f"{base}.post_attention_layernorm", hidden),
        **linear("up", (f"{base}.mlp.dense_h_to_4h",), (inner,), hidden, True),
        **linear("down", (f"{base}.mlp.dense_4h_to_h",), (hidden,), inner, True),
    }
