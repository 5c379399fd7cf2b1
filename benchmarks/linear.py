"""How fast is one int8 linear on a CPU, beside every other way to compute it?

    python benchmarks/linear.py [--threads 2] [--repeats 7] [--rows 1 8 64 512] [--before PYTHON]

One run, interleaved, medians, the same threads and the same x, its quantization included:

    fp32, bf16    F.linear
    _int_mm       torch._int_mm of x and weight that are int8 already: no scales, int32 out
    bitsandbytes  Linear8bitLt, threshold 6.0
    torchao       Int8DynamicActivationInt8WeightConfig
    ours          the default: rotated by 64, hot columns in 16 bits, one plane
    ours, bf16    the same of x in bf16, as the way bf16 has it; y too
    accurate      the point of that name: two planes
    before        the default of another copy of this project, which runs in the environment of
                  PYTHON: rule row_rms 4.0 with 16 hot columns, weights row-major

x is normal with 6 features of 40 times that size, which are among the hot columns; bitsandbytes
finds them by itself. Correctness first: ours equals its specification bit for bit (but for the sums
of hot columns), and all are close to fp32. Every way goes through copies of its weight in turn,
together at least twice as large as the caches, so that a call reads its weight from memory.

Beside them: the bytes of weights that ours reads per second as a share of what the machine reads,
and its operations as a share of the int8 peak of a loop in registers (`engines/machine.cpp`).
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from engines.machine import describe_machine, measure_machine
from linear_before import Before, make_layer, seconds_per_call
from results import FOLDER, make_parser, write_result
from torch import Tensor
from torch.nn import functional

from dist_int8.config.accuracy import POINTS
from dist_int8.evaluation import linears
from dist_int8.int8 import ops, packing, reference
from dist_int8.int8.rotation import rotate_weight

SHAPES = ((3072, 576), (4096, 4096), (14336, 4096))  # N, K
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
LARGE = (1, 77, 500, 130, 200, 400)  # features of x
OURS = {"ours": POINTS["balanced"], "accurate": POINTS["accurate"]}
ALL_OURS = {*OURS, "ours, bf16", "before"}
LEAST_BYTES = 200e6  # of the copies of a weight, where the caches are small or unknown
LONGEST_S = 20.0  # of the repeats of a cell, beyond which two are enough
FARTHEST = 0.2  # relative error to fp32; torchao, which has no answer to large features, has 0.11


def bytes_of_caches() -> int:
    """Bytes of the data caches that one core reaches, 0 if Linux does not say."""
    found = 0
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "type").read_text().strip() != "Instruction":
            found += 1024 * int((index / "size").read_text().strip().removesuffix("K"))
    return found


class Cell:
    """One layer in all ways."""

    def __init__(self, N: int, K: int, before: Before | None) -> None:
        self.N, self.K, self.before = N, K, before
        num_copies = 1 + int(max(LEAST_BYTES, 2 * bytes_of_caches()) // (N * K))
        self.weight = make_layer(N, K)
        self.copies = [self.weight.clone() for _ in range(1 + num_copies // 4)]
        self.halves = [self.weight.bfloat16() for _ in range(1 + num_copies // 2)]
        weight_int8 = reference.quantize_weight(self.weight)[0]
        self.int8 = [weight_int8.clone() for _ in range(num_copies)]
        linear = torch.nn.Linear(K, N, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(self.weight, requires_grad=False)
        matrix = linears.Matrix(linear)
        self.bitsandbytes = [linears.bitsandbytes_linear(matrix, 6.0) for _ in range(num_copies)]
        self.torchao = [linears.torchao_linear(matrix) for _ in range(num_copies)]
        self._make_ours(num_copies)
        if before is not None:
            before.make(N, K, num_copies)

    def _make_ours(self, num_copies: int) -> None:
        num_hot = POINTS["balanced"].num_hot_columns
        features = torch.randperm(self.K, generator=torch.Generator().manual_seed(1)).tolist()
        others = [k for k in features if k not in LARGE]
        hot = sorted([*LARGE, *others[: num_hot - len(LARGE)]])
        self.hot_columns = torch.tensor(hot, dtype=torch.int32)
        self.hot_weight = self.weight[:, hot].bfloat16()
        cold = self.weight.index_fill(1, self.hot_columns.long(), 0.0)
        rotated = rotate_weight(cold, POINTS["balanced"].rotation)
        self.weight_int8, self.col_scale = reference.quantize_weight(rotated)
        packed_hot = packing.pack_(self.hot_weight.clone(), 1)
        self.ours = [
            (packing.pack_(self.weight_int8.clone(), packing.GROUP), packed_hot)
            for _ in range(num_copies)
        ]

    def ways(self, x: Tensor) -> dict[str, Callable[[], Any]]:
        """Functions that compute the layer of x [M, K]."""
        half = x.bfloat16()
        x_int8 = reference.quantize_weight(x)[0]
        copies, halves, int8 = map(itertools.cycle, (self.copies, self.halves, self.int8))
        bitsandbytes, torchao = map(itertools.cycle, (self.bitsandbytes, self.torchao))
        ways: dict[str, Callable[[], Any]] = {
            "fp32": lambda: functional.linear(x, next(copies)),
            "bf16": lambda: functional.linear(half, next(halves)),
            "_int_mm": lambda: torch._int_mm(x_int8, next(int8).T),
            "bitsandbytes": lambda: next(bitsandbytes)(x),
            "torchao": lambda: next(torchao)(x),
        }
        # shared, so that no point finds in a cache what another one has read
        layers = itertools.cycle(self.ours)
        for name, point in OURS.items():
            ways[name] = lambda rule=point.rule: self.run(x, rule, *next(layers))
        ways["ours, bf16"] = lambda: self.run(half, POINTS["balanced"].rule, *next(layers))
        return ways

    def run(self, x: Tensor, rule: str, weight_int8: Tensor, hot_weight: Tensor) -> Tensor:
        return ops.int8_linear(
            x,
            weight_int8,
            self.col_scale,
            outlier_rule=rule,
            outlier_threshold=0.0,
            hot_columns=self.hot_columns,
            hot_weight=hot_weight,
            rotation=POINTS["balanced"].rotation,
        )

    def check(self, x: Tensor) -> dict[str, float]:
        """Asserts that all ways compute the layer; returns their relative errors to fp32."""
        want = functional.linear(x, self.weight)
        for point in OURS.values():
            # bit for bit without the products of hot columns, which torch sums in another order
            some = x[:8].index_fill(1, self.hot_columns.long(), 0.0)
            exact = reference.int8_linear(
                some,
                self.weight_int8,
                self.col_scale,
                outlier_rule=point.rule,
                outlier_threshold=0.0,
                hot_columns=self.hot_columns,
                hot_weight=self.hot_weight,
                rotation=point.rotation,
            )
            got = self.run(some, point.rule, *self.ours[0])
            assert torch.equal(got, exact), f"{point} differs from its specification"
        results = {name: way() for name, way in self.ways(x).items() if name != "_int_mm"}
        if self.before is not None:
            results["before"] = self.before.result(x)
        errors = {
            name: ((got.float() - want).norm() / want.norm()).item()
            for name, got in results.items()
        }
        assert max(errors.values()) < FARTHEST, errors
        return errors

    def measure(self, M: int, repeats: int) -> dict[str, Any]:
        x = torch.randn(M, self.K, generator=torch.Generator().manual_seed(M))
        x[:, list(LARGE)] *= 40.0
        errors = self.check(x)
        timed = {
            name: functools.partial(seconds_per_call, way) for name, way in self.ways(x).items()
        }
        if self.before is not None:
            timed["before"] = self.before.seconds
        return {
            "N": self.N,
            "K": self.K,
            "M": M,
            "milliseconds": interleaved_medians(timed, repeats),
            "relative_errors": errors,
        }


def interleaved_medians(timed: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each function, in rounds after one that warms up."""
    samples: dict[str, list[float]] = {name: [] for name in timed}
    started = time.perf_counter()
    for round_ in range(repeats + 1):
        if round_ > 2 and time.perf_counter() - started > LONGEST_S:
            break
        for name, function in timed.items():
            seconds = function()
            if round_:
                samples[name].append(1e3 * seconds)
    return {name: statistics.median(values) for name, values in samples.items()}


def shares(figure: dict[str, Any], machine: dict[str, Any]) -> dict[str, float]:
    """What ours reads and computes, as shares of what the machine can."""
    seconds = figure["milliseconds"]["ours"] / 1e3
    N, K, M = figure["N"], figure["K"], figure["M"]
    num_bytes = N * K + 2 * N * POINTS["balanced"].num_hot_columns
    return {
        "of_bandwidth": num_bytes / seconds / 1e9 / machine["read_gb_per_s"],
        "of_int8_peak": 2 * M * N * K / seconds / 1e9 / machine["int8_gops"],
    }


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    before = Before(args.before, args.threads) if args.before else None
    for N, K in SHAPES:
        machine = measure_machine(FOLDER, args.threads)  # it varies from minute to minute
        print(f"{N}x{K}: {machine}")
        cell = Cell(N, K, before)
        for M in args.rows:
            figure = cell.measure(M, args.repeats)
            figure["shares"] = shares(figure, machine)
            figure["machine"] = machine
            yield figure
        del cell  # gigabytes, before the next one is made
    if before is not None:
        before.close()


def main() -> None:
    parser = make_parser(__doc__, takes_model=False)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--before", type=Path, help="Python that imports another dist_int8")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    info = ops.library_info()
    assert "int8_linear" in info["cpu_ops"], f"the compiled library is missing: {info['error']}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    print(f"{info['cpu_instruction_set']}, {args.threads} threads; milliseconds; {machine}")
    figures = []
    with torch.inference_mode():
        for figure in measure_all(args):
            figures.append(figure)
            times = figure["milliseconds"]
            fastest = min((name for name in times if name not in ALL_OURS), key=times.__getitem__)
            cells = " ".join(f"{name} {value:.2f}" for name, value in times.items())
            of = ", ".join(f"{value:.0%} {name}" for name, value in figure["shares"].items())
            print(
                f"{figure['N']}x{figure['K']} M={figure['M']}: {cells}; {of}; "
                f"{times[fastest] / times['ours']:.2f} x {fastest}",
                flush=True,
            )
    setting = {"threads": args.threads, "instruction_set": info["cpu_instruction_set"]}
    figures = {**setting, "machine": machine, "layers": figures}
    write_result("linear", figures, args.json, args.raw)


if __name__ == "__main__":
    main()
