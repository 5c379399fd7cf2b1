"""Time of a stage, from bytes, operations and a device profile. Pure.

Times are integers in picoseconds: sums do not depend on the order of addition, so planning is
deterministic and equal plans compare equal.

A linear layer over M rows reads its weights once (bytes / bandwidth) and computes 2 * M * N * K
operations (operations / rate). A GPU overlaps the two and takes the longer; a CPU takes their sum.

Around its int8 linears a GPU also quantizes rows and, with many of them, writes the int32 sums of a
GEMM and reads them again; and its host launches kernel after kernel, unless they are replayed as a
CUDA graph. The rates of a CPU are those of whole linears and have all of that in them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_int8.partition.memory import (
    INT32_BYTES,
    BlockSizes,
    Formats,
    Linear,
    ModelSizes,
    block_linears,
    head_table_bytes,
    kv_bytes_per_token,
    linear_bytes,
)
from dist_int8.partition.profiles import DeviceProfile

PS_PER_S = 10**12
PS_PER_MS = 10**9
# Kernels of a block that decodes, and of one that takes prompts (benchmarks/launches.py).
DECODE_KERNELS, PREFILL_KERNELS = 9, 14
HEAD_KERNELS = 16  # of a step besides its blocks (17 of BLOOM): embedding, head and sampler
# With more rows a GEMM leaves int32 sums in memory on data-center GPUs (csrc, gemm_tiles.h).
MAX_ROWS_WITHOUT_SUMS = 128
# A thread block quantizes a row, feature after feature: H200, 31 us for a row of 57,344 and 16 us
# for one of 14,336 (benchmarks/results/gpu).
QUANTIZE_PS_PER_FEATURE = 400


@dataclass(frozen=True)
class StepShape:
    """One micro-batch.

    Attributes:
        num_rows: number of tokens: num_sequences in decode, more in prefill.
        num_sequences: number of sequences the rows belong to; each reads its own keys and values.
        context: number of positions that every sequence attends to.
        is_recorded: whether its kernels are replayed as a CUDA graph.
    """

    num_rows: int
    num_sequences: int
    context: int = 0
    is_recorded: bool = False

    @property
    def num_kernels(self) -> int:
        """Number of kernels of a block that the host launches."""
        if self.is_recorded:
            return 0
        return DECODE_KERNELS if self.num_rows == self.num_sequences else PREFILL_KERNELS


def block_ps(
    block: BlockSizes, formats: Formats, profile: DeviceProfile, step: StepShape, index: int = 0
) -> int:
    """Computes the picoseconds that decoder block `index` takes for one micro-batch.

    The longer of what the device does and of what its host takes to launch it.
    """
    total = _to_ps(profile.block_overhead_s)
    for linear in block_linears(block):
        int8 = formats.is_int8(f"blocks.{index}.{linear.name}")
        num_hot = formats.count_hot_columns(linear.name) if int8 else 0
        num_bytes = linear_bytes(linear, formats, int8=int8, num_hot_columns=num_hot)
        total += _linear_ps(linear.num_weights, num_bytes, step.num_rows, int8, profile)
        if int8 and profile.overlaps:
            total += _conversion_ps(linear, formats, profile, step.num_rows)
    total += _attention_ps(block, formats, profile, step)
    return max(total, _to_ps(step.num_kernels * profile.launch_s))


def _attention_ps(
    block: BlockSizes, formats: Formats, profile: DeviceProfile, step: StepShape
) -> int:
    num_bytes = (
        step.num_sequences
        * step.context
        * kv_bytes_per_token(block, formats.float_size, int8=formats.kv_int8)
    )
    # scores and weighted values: 2 operations each per row, head, dimension and position
    operations = 4 * step.num_rows * step.context * block.num_heads * block.head_dim
    return _ps(num_bytes, profile.float_bandwidth, operations, profile.attention_ops, profile)


def _conversion_ps(linear: Linear, formats: Formats, profile: DeviceProfile, num_rows: int) -> int:
    """Computes the picoseconds to quantize the rows of x, and to finish the sums of a GEMM."""
    num_bytes = num_rows * linear.num_inputs * (formats.float_size + 1)
    quantizing = max(
        _to_ps(num_bytes / profile.float_bandwidth), linear.num_inputs * QUANTIZE_PS_PER_FEATURE
    )
    if num_rows <= MAX_ROWS_WITHOUT_SUMS:
        return quantizing
    sums = 2 * num_rows * linear.num_outputs * INT32_BYTES  # written and read
    return quantizing + _to_ps(sums / profile.float_bandwidth)


def head_ps(
    model: ModelSizes,
    formats: Formats,
    profile: DeviceProfile,
    *,
    num_rows: int,
    is_recorded: bool = False,
) -> int:
    """Computes the picoseconds of the head for `num_rows` rows, one per token to sample.

    Of kernels that are launched one by one, all that are not of blocks count here.
    """
    num_weights = model.vocab_size * model.embedding_size
    num_bytes = head_table_bytes(model, formats)
    total = _linear_ps(num_weights, num_bytes, num_rows, formats.head_int8, profile)
    return total if is_recorded else max(total, _to_ps(HEAD_KERNELS * profile.launch_s))


def hop_ps(
    model: ModelSizes, formats: Formats, profile: DeviceProfile, *, num_rows: int, same_host: bool
) -> int:
    """Computes the picoseconds to pass hidden states [num_rows, hidden] to the next stage."""
    num_bytes = num_rows * model.hidden_size * formats.float_size
    if same_host:
        return _to_ps(profile.link_latency_s + num_bytes / profile.link_bandwidth)
    return _to_ps(profile.network_latency_s + num_bytes / profile.network_bandwidth)


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
    return _to_ps(max(reading, computing) if profile.overlaps else reading + computing)


def _to_ps(seconds: float) -> int:
    return round(seconds * PS_PER_S)
