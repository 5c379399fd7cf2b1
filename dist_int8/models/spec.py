"""What a model is, as plain data: sizes, norms, positions, residual order.

A family (`models/families/*.py`) turns a transformers config into a `ModelSpec`; `DecoderBlock` and
`DecoderStage` are built from nothing else. Every class here is frozen and holds only numbers,
strings and tuples, so a spec can be compared, hashed and sent to another rank.
"""

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "relu", "gelu", "gelu_tanh", "bloom_gelu"]


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding on the first `2 * len(inv_freq)` dimensions of each head.

    Attributes:
        inv_freq: radians per position of each rotated pair, already scaled by the config's rope
            variant.
        attention_scaling: factor on cos and sin (yarn and longrope; 1 elsewhere).
        variant: transformers' rope_type.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    variant: str = "default"

    @property
    def grows(self) -> bool:
        """Whether the frequencies change with the length of a sequence, beyond a limit."""
        return self.variant in ("dynamic", "longrope")


@dataclass(frozen=True)
class BlockSpec:
    """One decoder block.

    Attributes:
        norm_affine: False: the norm has neither weight nor bias (weight 1, bias 0).
        gated: True: down(activation(gate(x)) * up(x)); False: down(activation(up(x))).
        norm_after: True: norm(x + sublayer(x)), as OPT-350m; False: x + sublayer(norm(x)).
        parallel_residual: True: x + attention(norm_1(x)) + mlp(norm_2(x)), as GPT-NeoX.
        residual_from_norm: True: norm(x) + sublayer(norm(x)), BLOOM's
            apply_residual_connection_post_layernorm.
        window: number of most recent positions a token attends to, including its own; 0: all.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: NormKind
    norm_eps: float
    norm_affine: bool = True
    activation: Activation = "silu"
    gated: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    norm_after: bool = False
    parallel_residual: bool = False
    residual_from_norm: bool = False
    window: int = 0

    @property
    def qkv_size(self) -> int:
        """Output features of the fused query-key-value linear."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder-only language model.

    Attributes:
        family: the module in `models/families` that knows the tensor names.
        model_type: transformers' model_type.
        max_positions: maximum number of positions; None: no limit (ALiBi).
        embedding_size: width of the token embedding and of the head's input; not hidden_size in
            OPT-350m.
        num_position_rows: rows of a learned position table; 0: none.
        position_offset: row of the learned position table that belongs to position 0.
    """

    family: str
    model_type: str
    vocab_size: int
    hidden_size: int
    blocks: tuple[BlockSpec, ...]
    tied_head: bool
    max_positions: int | None
    embedding_size: int
    rotary: RotarySpec | None = None
    alibi: bool = False
    num_position_rows: int = 0
    position_offset: int = 0
    embedding_norm: bool = False
    final_norm: bool = True

    @property
    def num_blocks(self) -> int:
        """Decoder blocks of the whole model."""
        return len(self.blocks)

    @property
    def limit_advice(self) -> str:
        """What to do where more positions are wanted than max_positions."""
        advice = "lower it or leave it out"
        if self.rotary is not None and self.rotary.grows:
            advice += (
                f" (rope_type {self.rotary.variant!r} changes the frequencies of longer sequences "
                "as they grow, which is not supported; yarn and linear have fixed ones)"
            )
        return advice

    @property
    def has_projections(self) -> bool:
        """Whether `project_in` and `project_out` stand between the embedding and the blocks."""
        return self.embedding_size != self.hidden_size
