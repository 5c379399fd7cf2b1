"""How fast and how exact is one int8 linear layer on a GPU, against bf16 and bitsandbytes?

    python benchmarks/gpu/linear.py [--models llama-8b ...] [--rows 1 16 ...] [--records FILE]
    python benchmarks/gpu/linear.py --device cpu --small    # tries the script out, measures nothing

The four linears of each model, every M, and outliers as real activations have them: 0.2% of the
elements in 4% of the columns of a block of 128 rows ("few"), or 0.9% in 31% ("many"; SmolLM2 with
16 hot columns, rule row_rms 4.0). Times are medians over replays of a CUDA graph that goes through
sets of buffers worth four times the L2 cache, so that weights come from memory as in a model. int8
times include the quantization of x. bitsandbytes (Linear8bitLt, threshold 6.0, fp16) waits for the
host and is timed without a graph. "none" is plain W8A8: one product, nothing added, what an engine
without outliers runs. "weights only" (int8_weight_linear) is measured up to M = 32, torch's own
int8 product (no scales: int32 out) above 16, which is its least. "rotated" is the default: x and
weights rotated in blocks of 64, hot columns in bf16, one int8 plane; the rules for outliers
(reference.outlier_mask) have neither.

Every way has its error |y - y64| / |y64| over sampled rows and outputs, y64 in fp64 from x, with
the weights as they were (total) and with the int8 weights (of the activations alone). Correctness
comes first: the op equals the specification on sampled outputs before it is timed. One record per
cell; one that fails or hangs is recorded and left out.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cells import Cells
from records import Records, make_parser
from timing import device_limits, environment, microseconds, num_sets
from torch import Tensor
from torch.nn import functional

from dist_int8.int8 import ops, reference
from dist_int8.int8.linear import Int8Linear

# model, N, K: the two models' linears in turn, the widest of each first.
LAYERS = [
    ("llama-8b", 28672, 4096),
    ("bloom-176b", 57344, 14336),
    ("llama-8b", 6144, 4096),
    ("bloom-176b", 43008, 14336),
    ("llama-8b", 4096, 14336),
    ("bloom-176b", 14336, 57344),
    ("llama-8b", 4096, 4096),
    ("bloom-176b", 14336, 14336),
]
SMALL_LAYERS = [("small", 96, 128), ("small", 65, 200)]
ROWS = [1, 16, 32, 128, 512, 2048]
OUTLIERS = {"few": (0.002, 0.04), "many": (0.009, 0.31)}  # of elements; of a block's columns
BLOCK_ROWS = 128


@dataclass(frozen=True)
class Way:
    """How a linear treats x."""

    rule: str
    threshold: float = 0.0
    num_hot: int = 0
    rotation: int = 0

    @property
    def weights(self) -> tuple[int, int]:
        """What its weights depend on."""
        return self.num_hot, self.rotation


DEFAULT = "rotated, 16 hot"
DYNAMIC = "row_rms 4.0"  # the dynamic rule whose outliers are counted
WAYS = {
    "none": Way("none"),
    DEFAULT: Way("none", num_hot=16, rotation=64),
    "rotated, 64 hot": Way("none", num_hot=64, rotation=64),
    "rotated": Way("none", rotation=64),
    "absolute 6.0": Way("absolute", 6.0),
    "row_rms 6.0": Way("row_rms", 6.0),
    DYNAMIC: Way("row_rms", 4.0),
    "all": Way("all"),  # two full planes: 15-bit activations
}
WEIGHT_ONLY_ROWS = 32
INT_MM_ROWS = 17  # torch._int_mm takes no fewer on a GPU
SAMPLED_ROWS, SAMPLED_OUTPUTS = 16, 512


def make_x(M: int, K: int, outliers: str, device: torch.device, seed: int) -> Tensor:
    """bf16 [M, K]: standard normal, with values of 8 to 20 in some columns of a block of rows."""
    generator = torch.Generator(device=device).manual_seed(seed)
    of_elements, of_columns = OUTLIERS[outliers]
    x = torch.randn(M, K, device=device, generator=generator).clamp_(-3.5, 3.5)
    num_blocks = -(-M // BLOCK_ROWS)
    chosen = torch.rand(num_blocks, K, device=device, generator=generator) < of_columns
    chosen = chosen.repeat_interleave(BLOCK_ROWS, dim=0)[:M]
    chosen &= torch.rand(M, K, device=device, generator=generator) < of_elements / of_columns
    size = 8 + 12 * torch.rand(M, K, device=device, generator=generator)
    return torch.where(chosen, size * x.sign(), x).bfloat16()


def flagged(x: Tensor) -> dict[str, float]:
    """Shares of elements, and of tiles of 128 rows by 64 columns, with outliers by DYNAMIC."""
    high = ops.quantize_rows(x, WAYS[DYNAMIC].rule, WAYS[DYNAMIC].threshold).x_high.ne(0)
    by_row = functional.pad(high, (0, -high.shape[1] % 64)).view(len(x), -1, 64).any(dim=2)
    tiles = torch.stack([block.any(dim=0) for block in by_row.split(BLOCK_ROWS)])
    return {"elements": high.float().mean().item(), "tiles": tiles.float().mean().item()}


def sampled(count: int, limit: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, limit)).long().unique()


class Weights:
    """A weight in int8, in sets of buffers: with hot columns and rotated, or as it is."""

    def __init__(self, weight: Tensor, num_hot: int, rotation: int) -> None:
        N, K = weight.shape
        hot = torch.arange(0, K, K // num_hot)[:num_hot] if num_hot else None
        self.layer = Int8Linear(
            K, N, bias=False, hot_columns=hot, rotation=rotation, device="meta", dtype=weight.dtype
        ).quantize_(weight)
        self.rotation = rotation
        int8 = self.layer.weight_int8
        self.int8 = [int8, *(int8.clone() for _ in range(num_sets(N * K, weight.device) - 1))]

    def sample(self, outputs: Tensor) -> None:
        """Keeps the floating weights that these outputs stand for."""
        layer = self.layer
        self.sampled64 = reference.dequantize_weight(
            layer.weight_int8[outputs], layer.col_scale[outputs], rotation=self.rotation
        ).double()
        if layer.hot_columns is not None:
            hot = layer.hot_columns.long()
            self.sampled64[:, hot] = layer.hot_weight[outputs].double()


class Layer:
    """One weight, in sets of buffers: int8 for us, bf16 for F.linear, int8 for bitsandbytes."""

    def __init__(self, N: int, K: int, device: torch.device) -> None:
        self.N, self.K, self.device = N, K, device
        generator = torch.Generator(device=device).manual_seed(N + K)
        weight = torch.randn(N, K, device=device, generator=generator, dtype=torch.bfloat16)
        weight.mul_(K**-0.5)
        kinds = {way.weights for way in WAYS.values()}
        self.ready = {kind: Weights(weight, *kind) for kind in kinds}
        plain = self.ready[WAYS["none"].weights]
        self.int8, self.col_scale = plain.int8, plain.layer.col_scale
        self.bf16 = [weight, *(weight.clone() for _ in range(num_sets(2 * N * K, device) - 1))]
        self.outputs = sampled(N, SAMPLED_OUTPUTS).to(device)
        self.weight64 = weight[self.outputs].double()
        for weights in self.ready.values():
            weights.sample(self.outputs)
        self.theirs: Any = None

    def add_bitsandbytes(self) -> None:
        """Their layer of the same weight, where it is installed."""
        if importlib.util.find_spec("bitsandbytes") is None:
            print("bitsandbytes is not installed: its column stays empty")
            return
        import bitsandbytes

        theirs = bitsandbytes.nn.Linear8bitLt(
            *(self.K, self.N), bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        weight = self.bf16[0].half().cpu()
        theirs.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False)
        self.theirs = theirs.to(self.device)

    def ours(self, x: Tensor, name: str, index: int = 0) -> Tensor:
        weights = self.ready[WAYS[name].weights]
        return ops.int8_linear(x, weights.int8[index], weights.layer.col_scale, **self.how(name))

    def how(self, name: str) -> dict[str, Any]:
        """Keywords of int8_linear."""
        way = WAYS[name]
        layer = self.ready[way.weights].layer
        return {
            "outlier_rule": way.rule,
            "outlier_threshold": way.threshold,
            "hot_columns": layer.hot_columns,
            "hot_weight": layer.hot_weight,
            "rotation": way.rotation,
        }

    def quantization(self, name: str) -> tuple[str, float, Tensor | None, int]:
        """Arguments of quantize_rows."""
        way = WAYS[name]
        return way.rule, way.threshold, self.ready[way.weights].layer.hot_columns, way.rotation

    def errors(self, y: Tensor, x: Tensor, name: str = "none") -> dict[str, float]:
        """Relative error of sampled outputs, against the weights and against the int8 weights."""
        rows = sampled(len(x), SAMPLED_ROWS).to(self.device)
        got, x64 = y[rows][:, self.outputs].double(), x[rows].double()
        wants = (x64 @ self.weight64.T, x64 @ self.ready[WAYS[name].weights].sampled64.T)
        total, activations = (((got - want).norm() / want.norm()).item() for want in wants)
        return {"total": total, "activations": activations}

    def check(self, x: Tensor, name: str) -> None:
        """The op equals the specification on sampled rows and outputs, within bf16."""
        rows = sampled(len(x), SAMPLED_ROWS).to(self.device)
        layer, how = self.ready[WAYS[name].weights].layer, self.how(name)
        if layer.hot_columns is not None:
            how["hot_columns"] = layer.hot_columns.cpu()
            how["hot_weight"] = layer.hot_weight[self.outputs].cpu()
        want = reference.int8_linear(
            x[rows].cpu(),
            layer.weight_int8[self.outputs].cpu(),
            layer.col_scale[self.outputs].cpu(),
            **how,
        ).float()
        got = self.ours(x, name)[rows][:, self.outputs].cpu().float()
        worst = ((got - want).abs() - 2**-7 * want.abs()).max() / want.abs().max()
        assert worst < 2**-8, f"{name} differs from the specification at M={len(x)}: {worst}"


class Cell:
    """One layer with M rows of x and one kind of outliers: what is timed, and how exact it is."""

    def __init__(self, layer: Layer, M: int, outliers: str) -> None:
        self.layer, self.M = layer, M
        self.xs = [
            make_x(M, layer.K, outliers, layer.device, seed)
            for seed in range(min(4, len(layer.int8)))
        ]
        # Outputs of a captured graph live until it is gone: not more sets than memory is good for.
        self.most = max(2, int(2e9 // (2 * M * layer.N)))
        self.times: dict[str, float] = {}

    def x(self, index: int) -> Tensor:
        return self.xs[index % len(self.xs)]

    def time(self, name: str, call: Callable[[Tensor, int], Any], count: int, **how: Any) -> None:
        """Median microseconds of call(x, number of the set) over `count` sets of buffers."""
        calls = [lambda i=i: call(self.x(i), i) for i in range(min(count, self.most))]
        self.times[name] = microseconds(calls, self.layer.device, **how)["median_us"]

    def measure(self) -> dict[str, Any]:
        layer, num_int8 = self.layer, len(self.layer.int8)
        x = self.xs[0]
        int8, scale = layer.int8, layer.col_scale
        errors = {"bf16": layer.errors(functional.linear(x, layer.bf16[0]), x)}
        self.time("bf16", lambda x, i: functional.linear(x, layer.bf16[i]), len(layer.bf16))
        for name, way in WAYS.items():
            layer.check(x, name)
            errors[name] = layer.errors(layer.ours(x, name), x, name)
            count = len(layer.ready[way.weights].int8)
            self.time(name, lambda x, i, name=name: layer.ours(x, name, i), count)  # type: ignore[misc]
        if self.M <= WEIGHT_ONLY_ROWS:
            exact = layer.errors(ops.int8_weight_linear(x, int8[0], scale), x)
            assert exact["activations"] < 2e-2, exact  # bf16 x and result
            errors["weights only"] = exact
            self.time(
                "weights only", lambda x, i: ops.int8_weight_linear(x, int8[i], scale), num_int8
            )
        how, weights = layer.quantization(DEFAULT), layer.ready[WAYS[DEFAULT].weights]
        rows = [ops.quantize_rows(x, *how) for x in self.xs]
        self.time("quantize_rows alone", lambda x, i: ops.quantize_rows(x, *how), num_int8)
        self.time(
            "int8_matmul alone",
            lambda x, i: ops.int8_matmul(
                rows[i % len(rows)],
                weights.int8[i],
                weights.layer.col_scale,
                hot_weight=weights.layer.hot_weight,
            ),
            num_int8,
        )
        if self.M >= INT_MM_ROWS:
            self.time(
                "torch._int_mm",
                lambda x, i: torch._int_mm(rows[i % len(rows)].x_int8, int8[i].t()),
                num_int8,
            )
        if layer.theirs is not None:
            errors["bitsandbytes"] = layer.errors(layer.theirs(x.half()), x)
            halves = [x.half() for x in self.xs]
            self.time(
                "bitsandbytes",
                lambda x, i: layer.theirs(halves[i % len(halves)]),
                num_int8,
                graph=False,
            )
        return {"flagged": flagged(x), "times_us": self.times, "errors": errors}


def ratios(cell: dict[str, Any], limits: dict[str, float]) -> dict[str, float]:
    """The default and plain W8A8, against bf16, bitsandbytes and the device's limits."""
    M, N, K, times = cell["M"], cell["N"], cell["K"], cell["times_us"]
    ours = times[DEFAULT]
    found = {
        "times_bf16": times["bf16"] / ours,
        "none_times_bf16": times["bf16"] / times["none"],
        "of_copy": (N * K + 2 * M * (K + N)) / ours / 1e6 / limits["copy_tb_per_s"],
    }
    if "int8_tops" in limits:
        found["of_int8"] = 2.0 * M * N * K / ours / 1e6 / limits["int8_tops"]
    if "bitsandbytes" in times:
        found["times_bitsandbytes"] = times["bitsandbytes"] / ours
    return found


def describe(cell: dict[str, Any]) -> str:
    theirs = f"{cell['times_bitsandbytes']:6.2f}" if "times_bitsandbytes" in cell else "     -"
    return (
        f"{cell['N']:6d} x {cell['K']:5d}  M {cell['M']:4d}  {cell['outliers']:4s}"
        f"  bf16 {cell['times_us']['bf16']:9.1f} us  none {cell['times_us']['none']:9.1f}"
        f"  default {cell['times_us'][DEFAULT]:9.1f}  x bf16 {cell['times_bf16']:5.2f}"
        f"  x bnb {theirs}  copy {cell['of_copy']:4.2f}  int8 {cell.get('of_int8', 0):4.2f}"
    )


def layers_of(args: Any) -> Iterator[tuple[str, int, int]]:
    for model, N, K in SMALL_LAYERS if args.small else LAYERS:
        if args.small or model in args.models:
            yield model, N, K


def measure_layer(
    cells: Cells,
    shape: dict[str, Any],
    wanted: list[tuple[int, str]],
    device: torch.device,
    limits: dict[str, float],
) -> None:
    """All wanted cells (M, outliers) of one layer."""
    layer = Layer(shape["N"], shape["K"], device)
    with cells.guard({**shape, "engine": "bitsandbytes"}):
        layer.add_bitsandbytes()
    for M, outliers in wanted:
        cell = {**shape, "M": M, "outliers": outliers}

        def measure(cell: dict[str, Any] = cell) -> dict[str, Any]:
            found = Cell(layer, cell["M"], cell["outliers"]).measure()
            return found | ratios({**cell, **found}, limits)

        found = cells.run("cell", cell, measure)
        if found is not None:
            print(describe(found), flush=True)


@torch.inference_mode()
def main() -> int:
    parser = make_parser(__doc__)
    models = sorted({model for model, _, _ in LAYERS})
    parser.add_argument("--models", nargs="*", choices=models, default=models)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--outliers", nargs="*", choices=list(OUTLIERS), default=list(OUTLIERS))
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        assert "int8_matmul" in ops.library_info()["cuda_ops"], ops.library_info()
    torch.manual_seed(0)
    records = Records(args.records, "linear")
    cells = Cells(records, args.skip_tried)
    limits = device_limits(device, args.small)
    records.add("environment", limits=limits, **environment(device))
    print(limits, flush=True)
    for model, N, K in layers_of(args):
        shape = {"model": model, "N": N, "K": K}
        wanted = [
            (M, outliers)
            for M in args.rows
            for outliers in args.outliers
            if not (args.small and M > BLOCK_ROWS)
            and not cells.was_tried({**shape, "M": M, "outliers": outliers})
        ]
        if wanted:
            with cells.guard(shape):
                measure_layer(cells, shape, wanted, device, limits)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return cells.status()


if __name__ == "__main__":
    sys.exit(main())
