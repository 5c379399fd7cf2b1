"""How fast and how exact is one int8 linear layer on a GPU, against bf16 and bitsandbytes?

    python benchmarks/gpu_linear.py [--models llama-8b ...] [--rows 1 4 ...] [--outliers 0 6 1%]
    python benchmarks/gpu_linear.py --device cpu --small    # tries the script out, measures nothing

One run: the four linears of each model, every M and every kind of outliers in x. Times are medians
over replays of a CUDA graph that goes through sets of buffers worth four times the L2 cache, so
that weights come from memory as in a model. int8 times include the quantization of x. bitsandbytes
(Linear8bitLt, threshold 6.0, fp16) waits for the host and is timed without a graph. "weights only"
(int8_weight_linear, no quantization of x) is measured up to M = 32.

Every point of the frontier is a rule for outliers (see reference.outlier_mask); its error is
|y - y64| / |y64| over sampled rows and outputs, y64 in fp64 from x, with the weights as they were
(total) and with the int8 weights (of the activations alone).

Correctness comes first: int8_matmul equals the specification on sampled outputs before it is timed.
"""

import importlib.util
import math

import torch
from results import make_parser, write_result
from timing import device_limits, environment, microseconds, num_sets
from torch.nn import functional

from dist_int8.int8 import ops, reference
from dist_int8.int8.linear import Int8Linear

# N x K of qkv, attention output, first and second linear of the MLP.
MODELS = {
    "llama-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "llama-70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "opt-66b": [(27648, 9216), (9216, 9216), (36864, 9216), (9216, 36864)],
    "bloom-176b": [(43008, 14336), (14336, 14336), (57344, 14336), (14336, 57344)],
}
SMALL = {"small": [(96, 128), (65, 200)]}
ROWS = [1, 4, 16, 17, 32, 128, 512, 2048, 4096]
OUTLIERS = ["0", "6", "1%"]
DEFAULT = "row_rms 4.0"
RULES = {
    "none": ("none", 0.0),  # naive W8A8: the fastest, not the numerics of this project
    "absolute 6.0": ("absolute", 6.0),
    "row_rms 6.0": ("row_rms", 6.0),
    DEFAULT: ("row_rms", 4.0),
    "all": ("all", 0.0),  # two full planes: 15-bit activations
}
WEIGHT_ONLY = "weights only"  # int8_weight_linear: activations as they are, for few rows
WEIGHT_ONLY_ROWS = 32
SAMPLED_ROWS, SAMPLED_OUTPUTS = 16, 512


def make_x(M, K, outliers, device, seed):
    generator = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(M, K, device=device, generator=generator).clamp_(-3.5, 3.5)
    if outliers == "6":
        x[:, torch.linspace(1, K - 2, 6).long().to(device)] *= 20.0
    elif outliers == "1%":
        where = torch.rand(M, K, device=device, generator=generator) < 0.01
        x = torch.where(where, 20.0 * x, x)
    return x.bfloat16()


def sampled(count, limit):
    return torch.linspace(0, count - 1, min(count, limit)).long().unique()


class Layer:
    """One weight, in sets of buffers: int8 for us, bf16 for F.linear, fp16 for bitsandbytes."""

    def __init__(self, N, K, device, with_bitsandbytes):
        self.N, self.K, self.device = N, K, device
        generator = torch.Generator(device=device).manual_seed(N + K)
        weight = torch.randn(N, K, device=device, generator=generator, dtype=torch.bfloat16)
        weight.mul_(K**-0.5)
        layer = Int8Linear(K, N, bias=False, device="meta").quantize_(weight)
        int8, self.col_scale = layer.weight_int8, layer.col_scale
        self.int8 = [int8, *(int8.clone() for _ in range(num_sets(N * K, device) - 1))]
        self.bf16 = [weight, *(weight.clone() for _ in range(num_sets(2 * N * K, device) - 1))]
        self.outputs = sampled(N, SAMPLED_OUTPUTS).to(device)
        self.weight64 = weight[self.outputs].double()
        self.int8_64 = int8[self.outputs].double() * self.col_scale[self.outputs, None].double()
        self.theirs = None
        if with_bitsandbytes:
            import bitsandbytes

            theirs = bitsandbytes.nn.Linear8bitLt(
                K, N, bias=False, has_fp16_weights=False, threshold=6.0
            ).requires_grad_(False)
            theirs.weight = bitsandbytes.nn.Int8Params(weight.half().cpu(), requires_grad=False)
            self.theirs = theirs.to(device)

    def ours(self, x, name, index=0):
        rule, threshold = RULES[name]
        return ops.int8_linear(
            x,
            self.int8[index],
            self.col_scale,
            outlier_rule=rule,
            outlier_threshold=threshold,
        )

    def errors(self, y, x):
        """Relative error of sampled outputs, against the weights and against the int8 weights."""
        rows = sampled(len(x), SAMPLED_ROWS).to(self.device)
        got, x64 = y[rows][:, self.outputs].double(), x[rows].double()
        wants = (x64 @ self.weight64.T, x64 @ self.int8_64.T)
        total, activations = (((got - want).norm() / want.norm()).item() for want in wants)
        return {"total": total, "activations": activations}

    def check(self, x, name):
        """The op equals the specification on sampled rows and outputs, within bf16."""
        rows = sampled(len(x), SAMPLED_ROWS).to(self.device)
        rule, threshold = RULES[name]
        want = reference.int8_linear(
            x[rows].cpu(),
            self.int8[0][self.outputs].cpu(),
            self.col_scale[self.outputs].cpu(),
            outlier_rule=rule,
            outlier_threshold=threshold,
        ).float()
        got = self.ours(x, name)[rows][:, self.outputs].cpu().float()
        worst = ((got - want).abs() - 2**-7 * want.abs()).max() / want.abs().max()
        assert worst < 2**-8, f"{name} differs from the specification at M={len(x)}: {worst}"


@torch.inference_mode()
def measure(layer, M, outliers, device):
    N, K = layer.N, layer.K
    xs = [make_x(M, K, outliers, device, seed) for seed in range(min(4, len(layer.int8)))]
    figure = {"N": N, "K": K, "M": M, "outliers": outliers, "times": {}, "errors": {}}
    times, errors = figure["times"], figure["errors"]

    # Outputs of a captured graph live until it is gone: not more sets than memory is good for.
    most = max(2, int(2e9 // (2 * M * N)))

    def timed(name, calls, **options):
        times[name] = microseconds(calls[:most], device, **options)

    timed(
        "bf16",
        [lambda i=i, w=w: functional.linear(xs[i % len(xs)], w) for i, w in enumerate(layer.bf16)],
    )
    errors["bf16"] = layer.errors(functional.linear(xs[0], layer.bf16[0]), xs[0])
    for name in RULES:
        layer.check(xs[0], name)
        errors[name] = layer.errors(layer.ours(xs[0], name), xs[0])
        timed(
            name,
            [
                lambda i=i, name=name: layer.ours(xs[i % len(xs)], name, i)
                for i in range(len(layer.int8))
            ],
        )
    if M <= WEIGHT_ONLY_ROWS:
        exact = ops.int8_weight_linear(xs[0], layer.int8[0], layer.col_scale)
        errors[WEIGHT_ONLY] = layer.errors(exact, xs[0])
        assert errors[WEIGHT_ONLY]["activations"] < 2e-2, errors  # bf16 x and result
        timed(
            WEIGHT_ONLY,
            [
                lambda i=i, w=w: ops.int8_weight_linear(xs[i % len(xs)], w, layer.col_scale)
                for i, w in enumerate(layer.int8)
            ],
        )
    rule, threshold = RULES[DEFAULT]
    quantized = [ops.quantize_rows(x, rule, threshold) for x in xs]
    timed("quantize_rows alone", [lambda x=x: ops.quantize_rows(x, rule, threshold) for x in xs])
    timed(
        "int8_matmul alone",
        [
            lambda i=i, w=w: ops.int8_matmul(quantized[i % len(xs)], w, layer.col_scale)
            for i, w in enumerate(layer.int8)
        ],
    )
    if layer.theirs is not None:
        halves = [x.half() for x in xs]
        timed("bitsandbytes", [lambda x=x: layer.theirs(x) for x in halves], graph=False)
        errors["bitsandbytes"] = layer.errors(layer.theirs(halves[0]), xs[0])
    return figure


def add_ratios(figure, limits):
    """Fractions of the device's limits and ratios, for the default rule."""
    N, K, M = figure["N"], figure["K"], figure["M"]
    ours = figure["times"][DEFAULT]["median_us"]
    moved = N * K + 2 * M * (K + N)
    figure["fraction_of_copy"] = moved / ours / 1e6 / limits["copy_tb_per_s"]
    figure["fraction_of_int8"] = 2.0 * M * N * K / ours / 1e6 / limits["int8_tops"]
    figure["times_bf16"] = figure["times"]["bf16"]["median_us"] / ours
    if "bitsandbytes" in figure["times"]:
        figure["times_bitsandbytes"] = figure["times"]["bitsandbytes"]["median_us"] / ours


def missed_targets(figures):
    """What the project aims at and this run did not reach, one line each."""
    missed = []

    def want(figure, name, least):
        value = figure.get(name)
        if value is not None and value < least:
            place = f"{figure['N']}x{figure['K']} M={figure['M']} outliers={figure['outliers']}"
            missed.append(f"{place}: {name} {value:.2f}, wanted {least}")

    for figure in figures:
        if figure["M"] <= 16 and figure["N"] * figure["K"] >= 1e8:
            want(figure, "fraction_of_copy", 0.85)
            want(figure, "times_bf16", 1.8)
        if figure["M"] >= 1024:
            want(figure, "times_bf16", 1.5)
        if figure["M"] == 1:
            want(figure, "times_bitsandbytes", 5.0)
        if figure["M"] == 2048:
            want(figure, "times_bitsandbytes", 2.0)
    return missed


HEADER = "        N x K       M  outliers      bf16 us      int8 us  x bf16   x bnb   copy   int8"


def print_rows(figures):
    for f in figures:
        theirs = f"{f['times_bitsandbytes']:7.2f}" if "times_bitsandbytes" in f else "      -"
        print(
            f"{f['N']:7d} x {f['K']:5d} {f['M']:6d} {f['outliers']:>9s} "
            f"{f['times']['bf16']['median_us']:12.1f} {f['times'][DEFAULT]['median_us']:12.1f} "
            f"{f['times_bf16']:7.2f} {theirs} {f['fraction_of_copy']:6.2f} "
            f"{f['fraction_of_int8']:6.2f}",
            flush=True,
        )


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny layers: only tries this out")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--outliers", nargs="*", choices=OUTLIERS, default=OUTLIERS)
    parser.add_argument("--no-bitsandbytes", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    with_bitsandbytes = not args.no_bitsandbytes and device.type == "cuda"
    if with_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        print("bitsandbytes is not installed: its column stays empty")
        with_bitsandbytes = False
    if device.type == "cuda":
        assert "int8_matmul" in ops.library_info()["cuda_ops"], ops.library_info()
    torch.manual_seed(0)
    limits = device_limits(device, args.small)
    print(limits, HEADER, sep="\n")
    shapes = [
        (model, shape)
        for model, linears in (SMALL if args.small else MODELS).items()
        if args.small or model in args.models
        for shape in linears
    ]
    figures = []
    for model, (N, K) in shapes:
        layer = Layer(N, K, device, with_bitsandbytes)
        for M in [m for m in args.rows if not args.small or m <= 128]:
            for outliers in args.outliers:
                figure = {"model": model, **measure(layer, M, outliers, device)}
                add_ratios(figure, limits)
                figures.append(figure)
                print_rows([figure])
        del layer
        if device.type == "cuda":
            torch.cuda.empty_cache()
    missed = missed_targets(figures)
    print(*missed, sep="\n")
    assert all(math.isfinite(f["times_bf16"]) for f in figures)
    record = {
        **environment(device),
        "limits": limits,
        "default": DEFAULT,
        "layers": figures,
        "missed_targets": missed,
    }
    if not args.small or args.json:
        write_result("gpu_linear", record, args.json)


if __name__ == "__main__":
    main()
