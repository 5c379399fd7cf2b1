"""Peak bytes of a stage beside its parameters and its KV cache. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dist_int8.partition.memory import FLOAT32_BYTES, Block, Formats, Model


@dataclass(frozen=True)
class Workload:
    """What is asked of the model at once.

    Attributes:
        num_sequences: slots of the KV cache.
        max_tokens: tokens of a slot, prompt and answer.
        prefill_chunk: prompt tokens of one micro-batch at most.
        num_micro_batches: micro-batches that share the sequences; None: one a stage.
    """

    num_sequences: int
    max_tokens: int
    prefill_chunk: int = 512
    num_micro_batches: int | None = None

    @property
    def num_tokens(self) -> int:
        """Positions of the KV cache."""
        return self.num_sequences * self.max_tokens

    @property
    def max_rows(self) -> int:
        """Tokens of one micro-batch at most: a chunk of prompts beside sequences that decode."""
        return min(self.prefill_chunk + self.num_sequences, self.num_tokens)


def activation_bytes(
    model: Model, formats: Formats, workload: Workload, *, first: bool, last: bool
) -> int:
    """Peak bytes of what a stage allocates beside parameters and KV cache.

    The largest of the phases of a micro-batch of `max_rows` tokens, each with what is alive in it
    (models/block.py, int8/plain.py; a test counts the live tensors of real steps):

    - attention: the residual stream, qkv, its fp32 copies, and for the longest prompt chunk the
      fp32 keys and values of its slot and three score tables [heads, chunk, context];
    - an MLP: the residual stream, the widened hidden states with the temporaries of the
      activation, and the two int8 planes of the input of `down`;
    - the head: fp32 logits of one row a sequence, twice while sampling;

    and the receive buffers of the transport and the position tables on top.
    """
    rows, size = workload.max_rows, formats.float_size
    phases = [phase for block in set(model.blocks) for phase in _phases(block, formats, workload)]
    if last:
        emitting = min(rows, workload.num_sequences)
        stream = (rows + 2 * emitting) * model.hidden_size * size
        logits = emitting * model.vocab_size * (2 * FLOAT32_BYTES + size)
        phases.append(stream + logits)
    buffers = 0 if first and last else 2 * rows * model.hidden_size * size
    return max(phases) + buffers + _table_bytes(model, workload)


def _phases(block: Block, formats: Formats, workload: Workload) -> Iterator[int]:
    """Bytes alive in the attention and in the MLP of a block."""
    rows, size = workload.max_rows, formats.float_size
    hidden, inner = block.hidden_size, block.intermediate_size
    heads = block.num_heads * block.head_dim
    stream = 3 * rows * hidden * size  # x, the residual, and their normalized sum
    chunk = min(workload.prefill_chunk, workload.max_tokens)
    slot = 2 * block.num_kv_heads * block.head_dim * workload.max_tokens * FLOAT32_BYTES
    scores = 3 * block.num_heads * chunk * workload.max_tokens * FLOAT32_BYTES
    copies = rows * (block.qkv_size * (size + FLOAT32_BYTES) + 3 * heads * FLOAT32_BYTES)
    yield stream + copies + slot + scores
    planes = 2 * rows * max(inner, hidden) if formats.int8 else 0
    temporaries = 2 if block.gated else 4  # gate, up | x, its cube, tanh, the product
    yield stream + rows * inner * size * (temporaries + 1) + planes


def _table_bytes(model: Model, workload: Workload) -> int:
    """cos and sin in fp32, a row a position."""
    if model.rotary is None:
        return 0
    return 2 * workload.max_tokens * len(model.rotary.inv_freq) * FLOAT32_BYTES
