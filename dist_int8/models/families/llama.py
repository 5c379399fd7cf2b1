"""Llama and the models that share its block: Mistral (window), Qwen2 (qkv biases), SmolLM."""

from typing import Any

from dist_int8.models.rotary import describe_rotary
from dist_int8.models.sources import TensorSource, linear, tensor
from dist_int8.models.spec import BlockSpec, ModelSpec

MODEL_TYPES = ("llama", "mistral", "qwen2")
PREFIX = "model."
IGNORED = (r"rotary_emb\.inv_freq$",)


def _list_windows(config: Any) -> list[int]:
    """Lists the attention window of each block; 0 for full attention."""
    layer_types: Any = getattr(config, "layer_types", None)
    num_blocks = config.num_hidden_layers
    if config.model_type == "qwen2":
        # Qwen2Config derives layer_types from use_sliding_window and max_window_layers.
        unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
        if unknown or len(layer_types) != num_blocks:
            raise ValueError(
                f"config.json:layer_types: must be {num_blocks} of 'full_attention' or "
                f"'sliding_attention', got {len(layer_types)} with {unknown or 'known names'}; use "
                "a model with these attention kinds"
            )
        window = config.sliding_window or 0
        return [window if kind == "sliding_attention" else 0 for kind in layer_types]
    window = config.sliding_window or 0 if config.model_type == "mistral" else 0
    return [window] * num_blocks


def describe(config: Any) -> ModelSpec:
    """Describes a Llama, Mistral or Qwen2 config as a `ModelSpec`."""
    hidden, num_heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // num_heads
    num_kv_heads = config.num_key_value_heads
    _check(config)
    rotary, max_positions = describe_rotary(
        config, head_dim, config.max_position_embeddings, whole_head=True
    )
    is_llama = config.model_type == "llama"
    attention_bias = bool(is_llama and config.attention_bias)

    def block(window: int) -> BlockSpec:
        return BlockSpec(
            hidden_size=hidden,
            intermediate_size=config.intermediate_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm="rms",
            norm_eps=config.rms_norm_eps,
            gated=True,
            qkv_bias=attention_bias or config.model_type == "qwen2",
            attention_output_bias=attention_bias,
            mlp_bias=bool(is_llama and config.mlp_bias),
            window=window,
        )

    return ModelSpec(
        family="llama",
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        embedding_size=hidden,
        blocks=tuple(block(window) for window in _list_windows(config)),
        tied_head=bool(config.tie_word_embeddings),
        max_positions=max_positions,
        rotary=rotary,
    )


def _check(config: Any) -> None:
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"config.json:num_key_value_heads: must divide num_attention_heads {num_heads}, got "
            f"{num_kv_heads}; check the config"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"config.json:hidden_act: must be 'silu' for a {config.model_type} model, got "
            f"{config.hidden_act!r}; gated MLPs with other activations are not supported"
        )
    parameters = config.rope_parameters or {}
    scaled = parameters.get("rope_type", "default") != "default"
    if scaled and parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            "config.json:rope_parameters.partial_rotary_factor: must be 1 for a "
            f"{config.model_type} model, got {config.rope_parameters['partial_rotary_factor']}; "
            "rotary covers the whole head"
        )


def edge_sources(spec: ModelSpec) -> dict[str, TensorSource]:
    """Describes the checkpoint tensors outside the blocks."""
    vocab, hidden = spec.vocab_size, spec.hidden_size
    return {
        "embedding.weight": tensor("model.embed_tokens.weight", vocab, hidden),
        "final_norm.weight": tensor("model.norm.weight", hidden),
        "lm_head.weight": tensor("lm_head.weight", vocab, hidden),
    }


def block_sources(spec: ModelSpec, index: int) -> dict[str, TensorSource]:
    """Describes the checkpoint tensors of block `index`."""
    block = spec.blocks[index]
    base = f"model.layers.{index}"
    attention, mlp = f"{base}.self_attn", f"{base}.mlp"
    hidden, inner = block.hidden_size, block.intermediate_size
    query, key = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
    return {
        "attention_norm.weight": tensor(f"{base}.input_layernorm.weight", hidden),
        **linear(
            "qkv",
            (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
            (query, key, key),
            hidden,
            block.qkv_bias,
        ),
        **linear(
            "attention_output",
            (f"{attention}.o_proj",),
            (hidden,),
            query,
            block.attention_output_bias,
        ),
        "mlp_norm.weight": tensor(f"{base}.post_attention_layernorm.weight", hidden),
        **linear(
            "gate_up",
            (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            (inner, inner),
            hidden,
            block.mlp_bias,
        ),
        **linear("down", (f"{mlp}.down_proj",), (hidden,), inner, block.mlp_bias),
    }
