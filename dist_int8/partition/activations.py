"""Peak bytes that a stage allocates on top of its parameters and KV cache. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dist_int8.partition.memory import FLOAT32_BYTES, INT32_BYTES, BlockSizes, Formats, ModelSizes

INT64_BYTES = 8
SLOT_UNIT = 16  # tokens (pipeline/kv_cache.py)
SPLIT_TOKENS, MAX_SPLITS = 256, 32  # of a context in decoding (csrc, attention_splits)
MAX_SUMS_BYTES = 64 << 20  # int32 sums of a GEMM on a GPU at once (csrc/ops/matmul_cuda.cpp)


@dataclass(frozen=True)
class Workload:
    """How much the model has to serve at the same time.

    Attributes:
        num_sequences: number of slots in the KV cache.
        max_tokens: maximum number of tokens in a slot, prompt and answer together.
        prefill_chunk: maximum number of prompt tokens in a micro-batch.
        num_micro_batches: number of micro-batches that share the sequences; None: one per stage.
        records_steps: whether decode steps are CUDA graphs, which keep memory of their own.
    """

    num_sequences: int
    max_tokens: int
    prefill_chunk: int = 512
    num_micro_batches: int | None = None
    records_steps: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of positions in the KV cache: a slot's are a multiple of `SLOT_UNIT`."""
        return self.num_sequences * -(-self.max_tokens // SLOT_UNIT) * SLOT_UNIT

    @property
    def max_rows(self) -> int:
        """Maximum number of tokens in a micro-batch: a prompt chunk and all decoding sequences."""
        return min(self.prefill_chunk + self.num_sequences, self.num_sequences * self.max_tokens)


def activation_bytes(
    model: ModelSizes, formats: Formats, workload: Workload, *, first: bool, last: bool
) -> int:
    """Computes the peak bytes that a stage allocates on top of parameters and KV cache.

    This is the largest phase of a micro-batch of `max_rows` tokens, counting every tensor alive in
    it, plus the transport's receive buffers, the position tables and what recorded decode steps
    keep. A test compares it with the live tensors of real steps.
    """
    rows, size = workload.max_rows, formats.float_size
    phases = []
    for block in set(model.blocks):
        stream = 3 * rows * block.hidden_size * size  # x, the residual and a norm's output
        rotates = model.rotary is not None
        phases += [stream + phase for phase in _attention_phases(block, formats, workload, rotates)]
        phases += _linear_phases(block, formats, rows)
    if last:
        phases.append(_logit_bytes(model, formats, workload, rows))
    buffers = 0 if first and last else 2 * rows * model.hidden_size * size
    if last:  # the tokens of every sequence, for penalties
        buffers += workload.num_sequences * workload.max_tokens * INT32_BYTES
    indices = 4 * INT64_BYTES * (rows + workload.max_tokens)  # positions, token ids, rows to keep
    total = max(phases) + buffers + indices + _table_bytes(model, workload)
    return total + _graph_bytes(model, formats, workload, last=last)


def _linear_phases(block: BlockSizes, formats: Formats, rows: int) -> list[int]:
    stream = 3 * rows * block.hidden_size * formats.float_size
    return [
        stream + _mlp_bytes(block, formats, rows),
        stream + _product_bytes(block, formats, rows),
    ]


def _logit_bytes(model: ModelSizes, formats: Formats, workload: Workload, rows: int) -> int:
    """Computes the bytes alive on the last stage while tokens are chosen."""
    emitting = min(rows, workload.num_sequences)
    stream = (rows + 2 * emitting) * model.hidden_size * formats.float_size
    # logits in the head's dtype, in fp32, and an fp32 copy for sampling
    return stream + emitting * model.vocab_size * (formats.float_size + 2 * FLOAT32_BYTES)


def _graph_bytes(model: ModelSizes, formats: Formats, workload: Workload, *, last: bool) -> int:
    """Computes the bytes that recorded decode steps keep (pipeline/graphs.py).

    They share one pool, as large as the largest of them needs; results and inputs of each stay.
    """
    if not workload.records_steps:
        return 0
    rows, size = workload.num_sequences, formats.float_size
    splits = min(-(-workload.max_tokens // SPLIT_TOKENS), MAX_SPLITS)
    phases = []
    for block in set(model.blocks):
        heads = block.num_heads * block.head_dim
        sums = block.num_heads * splits * (block.head_dim + 2) * FLOAT32_BYTES
        stream = 3 * block.hidden_size * size
        phases.append(rows * (stream + (block.qkv_size + heads) * size + sums))
        phases += _linear_phases(block, formats, rows)
    if last:
        phases.append(_logit_bytes(model, formats, workload, rows))
    kept = 8 * INT64_BYTES + (0 if last else 2 * model.hidden_size * size)
    return max(phases) + (3 + rows // 8) * rows * kept


def _attention_phases(
    block: BlockSizes, formats: Formats, workload: Workload, rotates: bool
) -> Iterator[int]:
    """Yields the bytes alive in attention: scores, softmax, weighted values (int8/plain.py).

    Attention runs in fp32, one sequence at a time. The worst case is the last prompt chunk of a
    sequence that fills its slot.
    """
    rows, context, size = workload.max_rows, workload.max_tokens, formats.float_size
    chunk = min(workload.prefill_chunk, context)
    heads = block.num_heads * block.head_dim
    kv_heads = block.num_kv_heads * block.head_dim
    # qkv and its fp32 copy, rotated queries and keys, the output
    copies = rows * (block.qkv_size * (size + FLOAT32_BYTES) + heads * FLOAT32_BYTES)
    copies += rotates * rows * (heads + kv_heads) * FLOAT32_BYTES
    scores = block.num_heads * chunk * context * FLOAT32_BYTES
    # keys or values of the slot; grouped-query attention repeats them for the product
    repeated = heads if block.num_heads > block.num_kv_heads else 0
    slot = (kv_heads + repeated) * context * FLOAT32_BYTES
    if formats.kv_int8:  # int8/plain.py: a chunk's qkv again, int8 heads, the dequantized slot
        copies += chunk * (block.qkv_size * (size + FLOAT32_BYTES) + heads * size)
        copies += 3 * kv_heads * context * size
    copies += chunk * context * (INT64_BYTES + 1)  # distances between positions, and the mask
    yield copies + slot + chunk * heads * FLOAT32_BYTES + scores
    yield copies + 3 * scores  # raw, masked, and after softmax
    yield copies + slot + chunk * heads * FLOAT32_BYTES + 2 * scores


def _mlp_bytes(block: BlockSizes, formats: Formats, rows: int) -> int:
    """Computes the bytes alive in an MLP: its rows, the activation's temporaries, int8 planes."""
    inner = block.intermediate_size
    copies = 3 if block.gated else 5  # gate, up and their product; GELU: x, its cube, tanh, ...
    planes = 2 * inner if formats.int8 else 0
    return rows * (copies * inner * formats.float_size + planes)


def _product_bytes(block: BlockSizes, formats: Formats, rows: int) -> int:
    """Computes the bytes alive in the widest int8 product: two planes of x, output, int32 sums."""
    if not formats.int8:
        return 0
    widest = max(block.qkv_size, block.intermediate_size * (1 + block.gated))
    sums = min(rows * widest * INT32_BYTES, MAX_SUMS_BYTES)
    return rows * (2 * block.hidden_size + widest * formats.float_size) + sums


def _table_bytes(model: ModelSizes, workload: Workload) -> int:
    """Computes the bytes of the rotary cos and sin tables, one fp32 row per position."""
    if model.rotary is None:
        return 0
    return 2 * workload.max_tokens * len(model.rotary.inv_freq) * FLOAT32_BYTES
