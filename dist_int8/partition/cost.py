"""Time of a stage, from bytes, operations and a device profile. Pure.

Times are integers in picoseconds: sums do not depend on the order of addition, so planning is
deterministic and equal plans compare equal.

A linear layer over M rows reads its weights once (bytes / bandwidth) and computes 2 * M * N * K
operations (operations / rate). A GPU overlaps the two and takes the longer; a CPU takes their sum.
"""

from __future__ import annotations

from dist_int8.partition.memory import (
    BlockSizes,
    Formats,
    ModelSizes,
    block_linears,
    head_table_bytes,
    kv_bytes_per_token,
    linear_bytes,
)
from dist_int8.partition.profiles import DeviceProfile

PS_PER_S = 10**12
PS_PER_MS = 10**9


def block_ps(
    block: BlockSizes,
    formats: Formats,
    profile: DeviceProfile,
    *,
    num_rows: int,
    num_sequences: int,
    context: int,
    index: int = 0,
) -> int:
    """Computes the picoseconds that decoder block `index` takes for one micro-batch.

    Args:
        num_rows: number of tokens in the micro-batch: num_sequences in decode, more in prefill.
        num_sequences: number of sequences the rows belong to; each reads its own keys and values.
        context: number of positions that every sequence attends to.
    """
    total = round(profile.block_overhead_s * PS_PER_S)
    for linear in block_linears(block):
        int8 = formats.is_int8(f"blocks.{index}.{linear.name}")
        num_hot = formats.count_hot_columns(linear.name) if int8 else 0
        num_bytes = linear_bytes(linear, formats, int8=int8, num_hot_columns=num_hot)
        total += _linear_ps(linear.num_weights, num_bytes, num_rows, int8, profile)
    kv_bytes = (
        num_sequences
        * context
        * kv_bytes_per_token(block, formats.float_size, int8=formats.kv_int8)
    )
    # scores and weighted values: 2 operations each per row, head, dimension and position
    operations = 4 * num_rows * context * block.num_heads * block.head_dim
    return total + _ps(kv_bytes, profile.float_bandwidth, operations, profile.float_ops, profile)


def head_ps(model: ModelSizes, formats: Formats, profile: DeviceProfile, *, num_rows: int) -> int:
    """Computes the picoseconds of the head for `num_rows` rows, one per token to sample."""
    num_weights = model.vocab_size * model.embedding_size
    num_bytes = head_table_bytes(model, formats)
    return _linear_ps(num_weights, num_bytes, num_rows, formats.head_int8, profile)


def hop_ps(
    model: ModelSizes, formats: Formats, profile: DeviceProfile, *, num_rows: int, same_host: bool
) -> int:
    """Computes the picoseconds to pass hidden states [num_rows, hidden] to the next stage."""
    num_bytes = num_rows * model.hidden_size * formats.float_size
    if same_host:
        seconds = profile.link_latency_s + num_bytes / profile.link_bandwidth
    else:
        seconds = profile.network_latency_s + num_bytes / profile.network_bandwidth
    return round(seconds * PS_PER_S)


def _linear_ps(
    num_weights: int, num_bytes: int, num_rows: int, int8: bool, profile: DeviceProfile
) -> int:
    bandwidth = profile.int8_bandwidth if int8 else profile.float_bandwidth
    rate = profile.int8_ops if int8 else profile.float_ops
    return _ps(num_bytes, bandwidth, 2 * num_rows * num_weights, rate, profile)


def _ps(
    num_bytes: int, bandwidth: float, operations: int, rate: float, profile: DeviceProfile
) -> int:
    reading, computing = num_bytes / bandwidth, operations / rate
    seconds = max(reading, computing) if profile.overlaps else reading + computing
    return round(seconds * PS_PER_S)
