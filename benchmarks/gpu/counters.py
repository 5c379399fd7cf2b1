"""What the hardware counters say of the kernels that matter: Nsight Compute around one call each.

    python benchmarks/gpu/counters.py [--records FILE]

Decoding (a linear of one row, attention over 2048 positions of 8 sequences) should be bound by
memory, prefill (a linear of 2048 rows) by the tensor cores. Every kernel that the calls launch is
recorded with its time, share of the peak memory bandwidth, tensor pipe use, occupancy and
registers. The clocks are left alone. Exit status 77 where there is no GPU, no ncu, or no counters.
"""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from records import Records, make_parser

from dist_int8.int8 import ops
from dist_int8.int8.kv import Int8KV

SKIPPED = 77
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of_bandwidth_pct",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "of_tensor_pipe_pct",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "of_sm_pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_pct",
    "launch__registers_per_thread": "registers",
}
SIZES = {"N": 28672, "K": 4096, "rows": 2048, "batch": 8, "context": 2048}
SMALL = {"N": 256, "K": 128, "rows": 64, "batch": 2, "context": 64}
MARK = "exponential"  # in the name of the kernel that run_calls puts before each call
NO_COUNTERS = "ERR_NVGPUCTRPERM"  # ncu's word where the driver does not let it read them
TILE = r"WarpSpecialized\w*\s*>, cute::tuple<cute::C<(\d+)>, cute::C<(\d+)>, cute::C<(\d+)>"
RULES: dict[str, Any] = {"outlier_rule": "none", "outlier_threshold": 0.0, "rotation": 64}


def calls(sizes: dict[str, int], device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    N, K = sizes["N"], sizes["K"]
    dtype = torch.bfloat16
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device)
    scale = torch.full((N,), 1e-3, device=device)
    for name, rows in (("decode linear", 1), ("prefill linear", sizes["rows"])):
        x = torch.randn(rows, K, device=device).to(dtype)
        yield name, lambda x=x: ops.int8_linear(x, weight, scale, **RULES)  # type: ignore[misc]
    batch, context, D = sizes["batch"], sizes["context"], 128
    keys = torch.randn(batch, 8, D, context, device=device).to(dtype)
    values = torch.randn(batch, 8, context, D, device=device).to(dtype)
    qkv = torch.randn(batch, 48 * D, device=device).to(dtype)
    places = torch.tensor([(slot, context - 1, 1) for slot in range(batch)], dtype=torch.int32)
    segments = ops.Segments.of(places, device)
    heads = ops.AttentionArgs(num_heads=32, num_kv_heads=8, scale=D**-0.5)
    yield "decode attention", lambda: ops.attention(qkv, keys, values, segments, heads)
    scale = torch.full((batch, 8, context), 0.01, device=device)
    int8 = [Int8KV(cache.char(), scale) for cache in (keys, values)]
    yield "decode attention, int8 KV", lambda: ops.attention(qkv, *int8, segments, heads)


@torch.inference_mode()
def run_calls(sizes: dict[str, int], device: torch.device) -> None:
    """What ncu runs: each call once unseen, then once between start and stop of the profiler."""
    runtime = torch.cuda.cudart() if device.type == "cuda" else None
    mark = torch.empty(1, device=device)
    for _, call in calls(sizes, device):
        call()
        if runtime is not None:
            torch.cuda.synchronize()
            runtime.cudaProfilerStart()
        mark.exponential_()  # a kernel that no call launches: the next ones are of the next call
        call()
        if runtime is not None:
            torch.cuda.synchronize()
            runtime.cudaProfilerStop()


def find_ncu() -> str | None:
    """Nsight Compute on the PATH, in CUDA's folder or in its own."""
    places = [
        "/usr/local/cuda/bin/ncu",
        *map(str, Path("/opt/nvidia").glob("nsight-compute/*/ncu")),
    ]
    return shutil.which("ncu") or next((place for place in places if Path(place).exists()), None)


def by_call(kernels: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The kernels with the call that launched them: each call begins behind a mark.

    Without a mark, since its kernel has another name there, all of them with an unknown call.
    """
    if not any(MARK in kernel["kernel"] for kernel in kernels):
        return [{**kernel, "call": "unknown"} for kernel in kernels]
    found, number = [], -1
    for kernel in kernels:
        if MARK in kernel["kernel"]:
            number, first = number + 1, kernel["launch"] + 1
        elif 0 <= number < len(names):
            found.append({**kernel, "call": names[number], "launch": kernel["launch"] - first})
    return found


def parse(output: str) -> list[dict[str, Any]]:
    """Kernels in the order of their launches, from ncu's CSV: a row per kernel and metric."""
    lines = output.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[int, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[header:]))):
        name = METRICS.get(row.get("Metric Name") or "")
        if name is None:
            continue
        number = int(row["ID"])
        kernel = kernels.setdefault(number, {"launch": number, "kernel": short(row["Kernel Name"])})
        try:
            kernel[name] = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a": a counter that this card or driver does not have
            kernel[name] = None
    return list(kernels.values())


def short(kernel: str) -> str:
    """A kernel's name without its arguments, CUTLASS's by its tile (which follows the schedule)."""
    tile = re.search(TILE, kernel)
    if tile:
        return f"cutlass {'x'.join(tile.groups())}"
    if MARK in kernel:
        return MARK
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0].removeprefix("dist_int8::")


def profile(records: Records, small: bool) -> int:
    """Runs the calls under ncu and records their kernels; the exit status of the step."""
    command = [str(find_ncu()), "--csv", "--print-units", "base", "--profile-from-start", "off"]
    command += ["--clock-control", "none", "--metrics", ",".join(METRICS)]
    command += [sys.executable, __file__, "--run-calls", *["--small"] * small]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
    names = [name for name, _ in calls(SMALL, torch.device("cpu"))]
    kernels = by_call(parse(done.stdout), names)
    for kernel in kernels:
        records.add("kernel", **kernel)
        print(kernel)
    if NO_COUNTERS in done.stdout + done.stderr:
        print("counters: the driver does not let ncu read them")
        return SKIPPED
    print(f"counters: {len(kernels)} kernels, ncu ended with status {done.returncode}")
    return 0 if kernels and done.returncode == 0 else 1


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--run-calls", action="store_true", help="what ncu runs")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.run_calls:
        run_calls(SMALL if args.small else SIZES, device)
        return 0
    ncu = find_ncu()
    if device.type != "cuda" or ncu is None:
        run_calls(SMALL, torch.device("cpu"))
        print("counters: no GPU" if ncu else "counters: ncu is not installed")
        return SKIPPED
    return profile(Records(args.records, "counters"), args.small)


if __name__ == "__main__":
    sys.exit(main())
