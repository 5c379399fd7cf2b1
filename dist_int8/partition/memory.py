"""Exact bytes of the parts of a model, from its spec alone. Pure; imports nothing of ours.

The classes below name what is read of a spec (`models.ModelSpec` and `BlockSpec` have it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

FLOAT32_BYTES = 4


class Block(Protocol):
    """Sizes of one decoder block."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def norm(self) -> str: ...

    @property
    def gated(self) -> bool: ...

    @property
    def qkv_bias(self) -> bool: ...

    @property
    def attention_output_bias(self) -> bool: ...

    @property
    def mlp_bias(self) -> bool: ...

    @property
    def qkv_size(self) -> int: ...


class Model(Protocol):
    """Sizes of a whole model."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def embedding_size(self) -> int: ...

    @property
    def num_position_rows(self) -> int: ...

    @property
    def embedding_norm(self) -> bool: ...

    @property
    def final_norm(self) -> bool: ...

    @property
    def tied_head(self) -> bool: ...

    @property
    def blocks(self) -> tuple[Block, ...]: ...


@dataclass(frozen=True)
class Formats:
    """How parameters are held.

    Attributes:
        int8: linear layers of blocks are int8 (1 byte a weight, 4 bytes an output feature).
        float_size: bytes of a floating-point parameter.
        vocab_size: bytes of an element of the token embedding and the head, which keep a 16-bit
            checkpoint's dtype.
    """

    int8: bool
    float_size: int
    vocab_size: int


def linear_bytes(num_outputs: int, num_inputs: int, bias: bool, formats: Formats) -> int:
    """Bytes of a linear layer [num_outputs, num_inputs] inside a block."""
    weight_size = 1 if formats.int8 else formats.float_size
    scale = FLOAT32_BYTES if formats.int8 else 0
    return num_outputs * (num_inputs * weight_size + scale + bias * formats.float_size)


def norm_bytes(size: int, kind: str, formats: Formats) -> int:
    """Bytes of a norm: a weight, and for LayerNorm a bias."""
    return size * formats.float_size * (2 if kind == "layer" else 1)


def block_bytes(block: Block, formats: Formats) -> int:
    """Bytes of a decoder block's parameters."""
    hidden, inner = block.hidden_size, block.intermediate_size
    shapes = (
        (block.qkv_size, hidden, block.qkv_bias),
        (hidden, block.num_heads * block.head_dim, block.attention_output_bias),
        (inner * (2 if block.gated else 1), hidden, block.mlp_bias),
        (hidden, inner, block.mlp_bias),
    )
    linears = sum(linear_bytes(*shape, formats) for shape in shapes)
    return linears + 2 * norm_bytes(hidden, block.norm, formats)


def embedding_bytes(model: Model, formats: Formats) -> int:
    """Bytes of what the first stage holds before its blocks."""
    tokens = model.vocab_size * model.embedding_size * formats.vocab_size
    positions = model.num_position_rows * model.hidden_size * formats.float_size
    norm = norm_bytes(model.hidden_size, model.blocks[0].norm, formats)
    return tokens + positions + model.embedding_norm * norm + _projection_bytes(model, formats)


def head_bytes(model: Model, formats: Formats) -> int:
    """Bytes of what the last stage holds after its blocks."""
    head = model.vocab_size * model.embedding_size * formats.vocab_size
    norm = norm_bytes(model.hidden_size, model.blocks[0].norm, formats)
    return head + model.final_norm * norm + _projection_bytes(model, formats)


def kv_bytes_per_token(block: Block, float_size: int) -> int:
    """Bytes of one position of one sequence in the KV cache of one block."""
    return 2 * block.num_kv_heads * block.head_dim * float_size


def _projection_bytes(model: Model, formats: Formats) -> int:
    """project_in or project_out, where the embedding is narrower than the blocks (OPT-350m)."""
    if model.embedding_size == model.hidden_size:
        return 0
    return linear_bytes(model.hidden_size, model.embedding_size, False, formats)
