"""Exact bytes of parameters and KV cache, from a spec alone. Pure; imports nothing of ours.

The protocols `BlockSizes` and `ModelSizes` list what is read from a spec; `models.BlockSpec` and
`models.ModelSpec` satisfy them. N output features, K input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

FLOAT32_BYTES = 4
INT32_BYTES = 4
SIXTEEN_BITS = 2


class BlockSizes(Protocol):
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


class Rotary(Protocol):
    """Rotary position embedding."""

    @property
    def inv_freq(self) -> tuple[float, ...]: ...


class ModelSizes(Protocol):
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
    def max_positions(self) -> int | None: ...

    @property
    def rotary(self) -> Rotary | None: ...

    @property
    def embedding_norm(self) -> bool: ...

    @property
    def final_norm(self) -> bool: ...

    @property
    def tied_head(self) -> bool: ...

    @property
    def blocks(self) -> tuple[BlockSizes, ...]: ...


@dataclass(frozen=True)
class Formats:
    """Formats in which parameters and the KV cache are held.

    Attributes:
        int8: whether the blocks' linear layers are int8 (1 byte per weight, 4 bytes per output
            feature).
        float_size: bytes per element of floating-point parameters, hidden states and KV cache.
        vocab_size: bytes per element of the token embedding and the head, which keep the dtype of
            a 16-bit checkpoint.
        head_int8: whether the head is int8 with one fp32 scale per token.
        embedding_int8: whether the token embedding is int8 with one fp32 scale per token.
        num_hot_columns: number H of input features per int8 linear of a block whose weights are
            also kept in the checkpoint's dtype: [N, H] weights and [H] int32 indices.
        down_hot_columns: the same of `down`; None: num_hot_columns.
        hot_size: bytes per weight of a hot column.
        head_hot_columns: number of hot columns of an int8 head; None: num_hot_columns.
        rotated: whether the int8 linears, and an int8 head, are rotated.
        kv_int8: whether the KV cache is int8 with one fp32 scale per token and head.
        skip: names of linears that stay in floating point, as in the setting skip_modules.
    """

    int8: bool
    float_size: int
    vocab_size: int
    head_int8: bool = False
    embedding_int8: bool = False
    num_hot_columns: int = 0
    down_hot_columns: int | None = None
    hot_size: int = SIXTEEN_BITS
    head_hot_columns: int | None = None
    rotated: bool = False
    kv_int8: bool = False
    skip: tuple[str, ...] = ()

    def count_hot_columns(self, linear: str) -> int:
        """Returns the number of hot columns of an int8 linear of a block, by its name ("qkv")."""
        if linear == "down" and self.down_hot_columns is not None:
            return self.down_hot_columns
        return self.num_hot_columns

    def is_int8(self, name: str) -> bool:
        """Returns whether the linear of this qualified name is int8 (as `int8.convert` does)."""
        return self.int8 and not any(f".{skipped}." in f".{name}." for skipped in self.skip)


@dataclass(frozen=True)
class Linear:
    """One linear layer [N, K] of a block.

    Attributes:
        name: name within the block, as in `models.DecoderBlock`.
        num_outputs: number of output features, N.
        num_inputs: number of input features, K.
        bias: whether it has a bias [N].
    """

    name: str
    num_outputs: int
    num_inputs: int
    bias: bool

    @property
    def num_weights(self) -> int:
        return self.num_outputs * self.num_inputs


def block_linears(block: BlockSizes) -> tuple[Linear, ...]:
    """Lists the linears of a decoder block, named as in `models.DecoderBlock`."""
    hidden, inner = block.hidden_size, block.intermediate_size
    wide = ("gate_up", 2 * inner) if block.gated else ("up", inner)
    heads = block.num_heads * block.head_dim
    return (
        Linear("qkv", block.qkv_size, hidden, block.qkv_bias),
        Linear("attention_output", hidden, heads, block.attention_output_bias),
        Linear(*wide, hidden, block.mlp_bias),
        Linear("down", hidden, inner, block.mlp_bias),
    )


def linear_bytes(linear: Linear, formats: Formats, *, int8: bool, num_hot_columns: int = 0) -> int:
    """Computes the bytes of a linear: weight, bias, and in int8 its fp32 scales and hot columns."""
    N, H = linear.num_outputs, min(num_hot_columns, linear.num_inputs)
    bias = linear.bias * N * formats.float_size
    if not int8:
        return linear.num_weights * formats.float_size + bias
    return linear.num_weights + N * FLOAT32_BYTES + bias + H * (N * formats.hot_size + INT32_BYTES)


def norm_bytes(size: int, kind: str, formats: Formats) -> int:
    """Computes the bytes of a norm: a weight, and for LayerNorm a bias."""
    return size * formats.float_size * (2 if kind == "layer" else 1)


def block_bytes(block: BlockSizes, formats: Formats, index: int = 0) -> int:
    """Computes the bytes of the parameters of decoder block `index`."""
    linears = sum(
        linear_bytes(
            linear,
            formats,
            int8=formats.is_int8(f"blocks.{index}.{linear.name}"),
            num_hot_columns=formats.count_hot_columns(linear.name),
        )
        for linear in block_linears(block)
    )
    return linears + 2 * norm_bytes(block.hidden_size, block.norm, formats)


def embedding_bytes(model: ModelSizes, formats: Formats) -> int:
    """Computes the bytes of what the first stage holds in front of its blocks."""
    positions = model.num_position_rows * model.hidden_size * formats.float_size
    norm = norm_bytes(model.hidden_size, model.blocks[0].norm, formats)
    return (
        vocab_bytes(model, formats, int8=formats.embedding_int8)
        + positions
        + model.embedding_norm * norm
        + _projection_bytes(model, formats, "project_in")
    )


def head_bytes(model: ModelSizes, formats: Formats) -> int:
    """Computes the bytes of what the last stage holds after its blocks."""
    norm = norm_bytes(model.hidden_size, model.blocks[0].norm, formats)
    return (
        head_table_bytes(model, formats)
        + model.final_norm * norm
        + _projection_bytes(model, formats, "project_out")
    )


def vocab_bytes(model: ModelSizes, formats: Formats, *, int8: bool) -> int:
    """Computes the bytes of the embedding's or head's table [V, E]; int8 adds a scale per token."""
    num_weights = model.vocab_size * model.embedding_size
    if int8:
        return num_weights + model.vocab_size * FLOAT32_BYTES
    return num_weights * formats.vocab_size


def head_table_bytes(model: ModelSizes, formats: Formats) -> int:
    """Computes the bytes of the head: its table, and in int8 its hot columns."""
    table = vocab_bytes(model, formats, int8=formats.head_int8)
    H = min(_head_hot_columns(formats), model.embedding_size)
    return table + H * (model.vocab_size * formats.hot_size + INT32_BYTES)


def _head_hot_columns(formats: Formats) -> int:
    if not formats.head_int8:
        return 0
    own = formats.head_hot_columns
    return formats.num_hot_columns if own is None else own


def shared_bytes(model: ModelSizes, formats: Formats) -> int:
    """Computes the bytes saved by a stage with both embedding and head: it holds a tied table once.

    They share only a table of the same format. An int8 head cannot use a 16-bit embedding's table;
    a head with hot columns, which its int8 weights and scales leave out, or a rotated one cannot
    use an int8 embedding's.
    """
    if not model.tied_head or formats.head_int8 != formats.embedding_int8:
        return 0
    if _head_hot_columns(formats) or (formats.head_int8 and formats.rotated):
        return 0
    return vocab_bytes(model, formats, int8=formats.head_int8)


def stage_weight_bytes(
    model: ModelSizes, blocks: range, formats: Formats, *, first: bool, last: bool
) -> int:
    """Computes the bytes of the parameters of one stage."""
    total = sum(block_bytes(model.blocks[i], formats, i) for i in blocks)
    total += embedding_bytes(model, formats) if first else 0
    total += head_bytes(model, formats) if last else 0
    return total - (shared_bytes(model, formats) if first and last else 0)


def model_bytes(model: ModelSizes, formats: Formats) -> int:
    """Computes the bytes of all parameters on one device; a tied table counts once."""
    return stage_weight_bytes(model, range(len(model.blocks)), formats, first=True, last=True)


def kv_bytes_per_token(block: BlockSizes, float_size: int, *, int8: bool = False) -> int:
    """Computes the bytes of one position of one sequence in the KV cache of one block.

    An int8 cache takes one byte per dimension and one fp32 scale per head.
    """
    head = block.head_dim + FLOAT32_BYTES if int8 else block.head_dim * float_size
    return 2 * block.num_kv_heads * head


def _projection_bytes(model: ModelSizes, formats: Formats, name: str) -> int:
    """Computes the bytes of project_in or project_out, for embeddings narrower than the blocks.

    OPT-350m has them.
    """
    hidden, narrow = model.hidden_size, model.embedding_size
    if narrow == hidden:
        return 0
    shape = (hidden, narrow) if name == "project_in" else (narrow, hidden)
    return linear_bytes(Linear(name, *shape, False), formats, int8=formats.is_int8(name))
