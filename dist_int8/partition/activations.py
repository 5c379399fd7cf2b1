"""Peak bytes of a stage beside its parameters and its KV cache. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dist_int8.partition.memory import FLOAT32_BYTES, INT32_BYTES, Block, Formats, Model

INT64_BYTES = 8
MAX_SUMS_BYTES = 64 << 20  # int32 sums of a GEMM on a GPU at once (csrc/ops/matmul_cuda.cpp)


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

    The largest of the phases of a micro-batch of `max_rows` tokens, each with what is alive in it;
    receive buffers of the transport and position tables on top. A test counts the live tensors of
    real steps.
    """
    rows, size = workload.max_rows, formats.float_size
    phases = []
    for block in set(model.blocks):
        stream = 3 * rows * block.hidden_size * size  # x, the residual, what a norm makes of them
        rotates = model.rotary is not None
        phases += [stream + phase for phase in _attention_phases(block, formats, workload, rotates)]
        phases.append(stream + _mlp_bytes(block, formats, workload))
        phases.append(stream + _product_bytes(block, formats, workload))
    if last:
        emitting = min(rows, workload.num_sequences)
        stream = (rows + 2 * emitting) * model.hidden_size * size
        # in the head's dtype, in fp32, and once more while sampling
        phases.append(stream + emitting * model.vocab_size * (size + 2 * FLOAT32_BYTES))
    buffers = 0 if first and last else 2 * rows * model.hidden_size * size
    indices = 4 * INT64_BYTES * (rows + workload.max_tokens)  # positions, token ids, rows to keep
    return max(phases) + buffers + indices + _table_bytes(model, workload)


def _attention_phases(
    block: Block, formats: Formats, workload: Workload, rotates: bool
) -> Iterator[int]:
    """Bytes alive in attention: scores, softmax, weighted values (int8/plain.py).

    Sequences are attended one by one, all in fp32: the largest is a chunk of a prompt whose
    sequence is full.
    """
    rows, context, size = workload.max_rows, workload.max_tokens, formats.float_size
    chunk = min(workload.prefill_chunk, context)
    heads = block.num_heads * block.head_dim
    kv_heads = block.num_kv_heads * block.head_dim
    # qkv and its fp32 copy, rotated queries and keys, the result
    copies = rows * (block.qkv_size * (size + FLOAT32_BYTES) + heads * FLOAT32_BYTES)
    copies += rotates * rows * (heads + kv_heads) * FLOAT32_BYTES
    scores = block.num_heads * chunk * context * FLOAT32_BYTES
    # keys or values of the slot; where query heads share them, repeated for the product
    repeated = heads if block.num_heads > block.num_kv_heads else 0
    slot = (kv_heads + repeated) * context * FLOAT32_BYTES
    if formats.kv_int8:  # int8/plain.py: qkv of a chunk anew, int8 heads, and the slot widened
        copies += chunk * (block.qkv_size * (size + FLOAT32_BYTES) + heads * size)
        copies += 3 * kv_heads * context * size
    copies += chunk * context * (INT64_BYTES + 1)  # ages of the positions, and what they hide
    yield copies + slot + chunk * heads * FLOAT32_BYTES + scores
    yield copies + 3 * scores  # as they are, masked, and their softmax
    yield copies + slot + chunk * heads * FLOAT32_BYTES + 2 * scores


def _mlp_bytes(block: Block, formats: Formats, workload: Workload) -> int:
    """Bytes alive in an MLP: the widened rows, its activation's temporaries, two int8 planes."""
    rows, inner = workload.max_rows, block.intermediate_size
    copies = 3 if block.gated else 5  # gate, up and their product; or x, its cube, tanh, ...
    planes = 2 * inner if formats.int8 else 0
    return rows * (copies * inner * formats.float_size + planes)


def _product_bytes(block: Block, formats: Formats, workload: Workload) -> int:
    """Bytes alive in the widest int8 product: two planes of x, the result and, on a GPU, sums."""
    if not formats.int8:
        return 0
    rows = workload.max_rows
    widest = max(block.qkv_size, block.intermediate_size * (1 + block.gated))
    sums = min(rows * widest * INT32_BYTES, MAX_SUMS_BYTES)
    return rows * (2 * block.hidden_size + widest * formats.float_size) + sums


def _table_bytes(model: Model, workload: Workload) -> int:
    """cos and sin in fp32, a row a position."""
    if model.rotary is None:
        return 0
    return 2 * workload.max_tokens * len(model.rotary.inv_freq) * FLOAT32_BYTES
