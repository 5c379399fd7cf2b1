"""Measures what the planner needs to know about a device, with the ops that a stage runs.

Each call takes the next of several weights, which together exceed every cache as in a real model: a
layer that stays in a cache would seem several times as fast. On a GPU calls are replayed as a CUDA
graph, since launching takes the host longer than reading a weight takes the card; and rows are
quantized before, since the plan counts that apart (`partition/cost.py`).
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_int8.config.accuracy import DEFAULT_POINT, POINTS
from dist_int8.int8 import ops, reference
from dist_int8.int8.convert import swap_linears
from dist_int8.models import BlockSpec, DecoderStage, ModelSpec, StageSlice, TokenBatch
from dist_int8.partition.cost import DECODE_KERNELS
from dist_int8.partition.profiles import DEFAULT_GPU, PROFILES

NUM_FEATURES = 4096  # input and output features of the measured layers
REPEATS = 5
CPU_WEIGHT_BYTES = 1 << 28
CUDA_WEIGHT_BYTES = 1 << 31
MANY_ROWS = {"cpu": 32, "cuda": 4096}
PROMPT_TOKENS = {"cpu": 256, "cuda": 4096}
_RULE: dict[str, Any] = {  # of the point "balanced"
    "outlier_rule": POINTS[DEFAULT_POINT].rule,
    "outlier_threshold": 0.0,
    "rotation": POINTS[DEFAULT_POINT].rotation,
}


def measure(
    device: str = "cpu",
    threads: int | None = None,
    name: str | None = None,
    num_features: int | None = None,
) -> dict[str, Any]:
    """Measures the fields of a `partition.DeviceProfile` on `device` in a few seconds.

    Links and networks are not measured: they keep the values of the built-in profile.

    Raises:
        ValueError: there is no such device, or there are more threads than cores.
    """
    place = _place(device, threads)
    on_cpu = place.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.float16
    num_features = num_features or NUM_FEATURES
    with torch.inference_mode():
        seconds = _linear_seconds(place, dtype, num_features)
        attention_ops = _attention_rate(place, dtype)
        overhead, launch = _overhead(place, dtype)
    float_bandwidth, float_ops = _bandwidth_and_rate(place, seconds["float"], num_features**2, 2)
    one, many = seconds["int8"]
    if not on_cpu:  # the plan counts writing and reading int32 sums apart
        many -= 8 * MANY_ROWS["cuda"] * num_features / float_bandwidth
    int8_bandwidth, int8_ops = _bandwidth_and_rate(place, (one, many), num_features**2, 1)
    return {
        **asdict(PROFILES["cpu" if on_cpu else DEFAULT_GPU]),
        "name": name or (_cpu_name() if on_cpu else torch.cuda.get_device_name(place)),
        "memory_bytes": _memory_bytes(place),
        "int8_bandwidth": int8_bandwidth,
        "float_bandwidth": float_bandwidth,
        "int8_ops": int8_ops,
        "float_ops": float_ops,
        "attention_ops": attention_ops,
        "overlaps": not on_cpu,
        "block_overhead_s": overhead,
        "launch_s": launch,
    }


def _linear_seconds(
    place: torch.device, dtype: torch.dtype, num_features: int
) -> dict[str, tuple[float, float]]:
    """Measures seconds of an int8 and a floating linear, each for one row and for many.

    A matrix-vector product is bound by reading; many rows add computing to that.
    """
    num_bytes = CPU_WEIGHT_BYTES if place.type == "cpu" else CUDA_WEIGHT_BYTES
    float_dtype = torch.bfloat16 if place.type == "cpu" else dtype
    generator = torch.Generator().manual_seed(0)
    one_row, many_rows = (
        torch.randn(num_rows, num_features, generator=generator).to(place, dtype)
        for num_rows in (1, MANY_ROWS[place.type])
    )
    weight = torch.randn(num_features, num_features, generator=generator)
    quantized, scale = reference.quantize_weight(weight)
    col_scale = scale.to(place)

    quantized_rows = {
        len(x): ops.quantize_rows(x, **_RULE) for x in (one_row, many_rows) if place.type == "cuda"
    }

    def int8(x: Tensor, w: Tensor) -> Tensor:
        if quantized_rows:
            return ops.int8_matmul(quantized_rows[len(x)], w, col_scale)
        return ops.int8_linear(x, w, col_scale, **_RULE)

    int8s = _copies(quantized.to(place), num_bytes)
    floats = _copies(weight.to(place, float_dtype), num_bytes)
    return {
        kind: (_seconds(op, one_row, weights, place), _seconds(op, many_rows, weights, place))
        for kind, op, weights in (("int8", int8, int8s), ("float", ops.linear, floats))
    }


def _bandwidth_and_rate(
    place: torch.device, seconds: tuple[float, float], num_weights: int, itemsize: int
) -> tuple[float, float]:
    """Computes bytes/s and operations/s from the seconds for one row and for many."""
    one, whole = seconds
    many = MANY_ROWS[place.type]
    if place.type == "cpu":  # reading and computing add up: the slope is the cost of a row
        a_row = max(whole - one, 0.1 * whole) / (many - 1)
        return itemsize * num_weights / max(one - a_row, 0.1 * one), 2 * num_weights / a_row
    return itemsize * num_weights / one, 2 * num_weights * many / whole


def _place(device: str, threads: int | None) -> torch.device:
    count = torch.cuda.device_count()
    names = ["cpu", *(f"cuda:{index}" for index in range(count))]
    if device not in names:
        raise ValueError(
            f"dist-int8 bench:device: device must be one of {', '.join(names)}, got {device!r}; "
            "dist-int8 doctor lists the visible devices"
        )
    if threads is not None:
        cores = os.cpu_count() or threads
        if threads > cores:
            raise ValueError(
                f"dist-int8 bench:threads: threads must be at most {cores}, got {threads}; "
                "give the threads of one stage"
            )
        torch.set_num_threads(threads)
    return torch.device(device)


def _copies(weight: Tensor, num_bytes: int) -> list[Tensor]:
    count = max(2, num_bytes // (weight.numel() * weight.element_size()))
    return [weight.clone() for _ in range(count)]


def _seconds(
    op: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    place: torch.device,
    records: bool = True,
) -> float:
    """Measures the median seconds of op(x, weight) over rounds through the weights.

    On a GPU a round is replayed as a CUDA graph, unless not `records`.
    """
    some = weights if len(x) == 1 else weights[:4]
    for weight in some[:2]:
        op(x, weight)

    def run() -> None:
        for weight in some:
            op(x, weight)

    if place.type == "cuda" and records:
        run = _record(run)
        run()
    rounds = []
    for _ in range(REPEATS):
        _wait(place)
        begin = time.perf_counter()
        run()
        _wait(place)
        rounds.append((time.perf_counter() - begin) / len(some))
    return statistics.median(rounds)


def _attention_rate(place: torch.device, dtype: torch.dtype) -> float:
    """Measures the operations per second of a prompt's attention, 4 per pair and feature."""
    num_tokens, heads, head_dim = PROMPT_TOKENS[place.type], 16, 128
    qkv = torch.randn(num_tokens, 3 * heads * head_dim).to(place, dtype)
    caches = [
        torch.zeros(1, heads, *shape, device=place, dtype=dtype)
        for shape in ((head_dim, num_tokens), (num_tokens, head_dim))
    ]
    segments = ops.Segments.of(torch.tensor([[0, 0, num_tokens]], dtype=torch.int32), place)
    args = ops.AttentionArgs(heads, heads, head_dim**-0.5)

    def attend(qkv: Tensor, _: Tensor) -> Tensor:
        return ops.attention(qkv, caches[0], caches[1], segments, args)

    pairs = num_tokens * (num_tokens + 1) // 2
    return 4 * pairs * heads * head_dim / _seconds(attend, qkv, [qkv] * 4, place)


def _overhead(place: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measures a block with tiny linears, within a stack of equal blocks.

    Returns:
        Seconds of a block, on a GPU replayed as a graph; and of the host, per kernel of a GPU.
    """
    size, count = 64, 20
    spec = BlockSpec(
        hidden_size=size,
        intermediate_size=size,
        num_heads=1,
        num_kv_heads=1,
        head_dim=size,
        norm="rms",
        norm_eps=1e-5,
        gated=True,
    )
    blocks = tuple([spec] * count)
    model = ModelSpec("llama", "llama", 1, size, blocks, False, size, size)
    stage = DecoderStage(model, StageSlice(range(count), first=False, last=False), dtype)
    for parameter in stage.parameters():
        parameter.fill_(1.0)
    swap_linears(stage, **_RULE).to(place)
    cache = torch.zeros(1, 1, size, size, device=place, dtype=dtype)
    caches = _OneLayer((cache, cache))
    batch = TokenBatch.from_segments(None, [(0, 0, 1)], device=place)
    x = torch.ones(1, size, device=place, dtype=dtype)

    def run(x: Tensor, _: Tensor) -> Tensor:
        return stage(batch, x, caches)

    launched = _seconds(run, x, [x] * count, place, records=False) / count
    if place.type == "cpu":
        return launched, 0.0
    return _seconds(run, x, [x] * count, place) / count, launched / DECODE_KERNELS


def _record(work: Callable[[], None]) -> Callable[[], None]:
    """What replays as a CUDA graph what `work` launches."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class _OneLayer(NamedTuple):
    """Key and value cache shared by all blocks."""

    caches: tuple[Tensor, Tensor]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.caches


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def _memory_bytes(place: torch.device) -> int:
    if place.type == "cuda":
        return torch.cuda.get_device_properties(place).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    return f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
