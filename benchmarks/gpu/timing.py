"""How long calls take on a GPU (on a CPU, to try a benchmark out), and what the device can do."""

import contextlib
import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dist_int8.int8 import ops

Call = Callable[[], Any]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def cache_bytes(device: torch.device) -> int:
    """The last level of cache that a benchmark must not measure by mistake."""
    if device.type != "cuda":
        return 1 << 20  # CPU runs only try the code out
    return torch.cuda.get_device_properties(device).L2_cache_size


def num_sets(bytes_per_set: int, device: torch.device) -> int:
    """Sets of buffers to go through in turn, so that none is still in the cache: four caches."""
    return min(64, max(2, math.ceil(4 * cache_bytes(device) / max(1, bytes_per_set)) + 1))


def microseconds(
    calls: Sequence[Call], device: torch.device, *, graph: bool = True, budget_ms: float = 30.0
) -> dict[str, float]:
    """Median and spread of one call, the calls made in turn (one a set of buffers).

    On a GPU the calls are captured into one CUDA graph and timed by events around its replays;
    graph=False launches them one by one, which is what calls that wait for the host need.
    """
    if device.type != "cuda":
        return _summary([_wall(calls) for _ in range(3)], len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for call in calls:
                call()
        run: Call = captured.replay
    else:

        def run() -> None:
            for call in calls:
                call()

    first = _events(run)
    repeats = int(min(100, max(5, budget_ms / max(1e-3, first))))
    return _summary([1e3 * _events(run) for _ in range(repeats)], len(calls))


def _events(run: Call) -> float:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def _wall(calls: Sequence[Call]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return 1e6 * (time.perf_counter() - started)


def _summary(totals: list[float], num_calls: int) -> dict[str, float]:
    ordered = sorted(total / num_calls for total in totals)
    tenth = len(ordered) // 10
    return {
        "median_us": statistics.median(ordered),
        "p10_us": ordered[tenth],
        "p90_us": ordered[-1 - tenth],
        "repeats": len(ordered),
    }


def device_limits(device: torch.device, small: bool) -> dict[str, float]:
    """What copies and matrix products reach here: the denominators of every fraction.

    copy: bytes read plus bytes written. int8 and bf16: square products of torch's libraries on
    random data.
    """
    n = 256 if small else 8192
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    c, d = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    limits = {"copy_tb_per_s": copy_tb_per_s(device, small)}
    products: dict[str, Call] = {
        "int8_tops": lambda: torch._int_mm(a, b.t()),
        "bf16_tflops": lambda: c @ d.t(),
    }
    for name, call in products.items():
        with contextlib.suppress(RuntimeError):  # a library that has no such product here
            limits[name] = (
                2.0 * n**3 / microseconds([call], device, budget_ms=100)["median_us"] / 1e6
            )
    return limits


def copy_tb_per_s(device: torch.device, small: bool) -> float:
    """Bytes read plus bytes written of one large copy on the device, in TB per second.

    Without a graph: replayed from one, a copy goes to a copy engine, which reaches two thirds of
    what kernels do (2.77 of 4.3 TB/s on an H200).
    """
    size = (1 << 20) if small else (1 << 32)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    copied = microseconds([lambda: target.copy_(source)], device, graph=False)
    return 2 * size / copied["median_us"] / 1e6


def environment(device: torch.device) -> dict[str, Any]:
    """What is needed to read a record later: card, versions and the compiled library."""
    info: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": dict(_versions()),
        "library": ops.library_info(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["capability"] = f"{properties.major}.{properties.minor}"
        info["multiprocessors"] = properties.multi_processor_count
        info["memory_bytes"] = properties.total_memory
        info["l2_bytes"] = properties.L2_cache_size
    return info


def _versions() -> Iterator[tuple[str, str]]:
    for package in ("torch", "transformers", "bitsandbytes", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)
