"""How fast is one int8 linear layer on a CPU, compared with fp32 and bitsandbytes?

    python benchmarks/linear.py [--threads 2] [--repeats 15] [--rows 1 8 64 512]

One run, interleaved, medians, the same threads and the same x: fp32 F.linear, bitsandbytes
Linear8bitLt (threshold 6.0), and int8_linear with the paper's rule (absolute 6.0) and row_rms 4.0,
including the quantization of x; with 0 and with 6 outlier columns. Correctness first: int8_linear
equals its specification bit for bit, and all three are close to fp32. Weights are reused, so a
layer that fits into the last-level cache (16 MB of int8 at 4096x4096) may stay there.
"""

import statistics
import time

import torch
from results import make_parser, write_result
from torch.nn import functional

from dist_int8.evaluation.linears import import_bitsandbytes
from dist_int8.int8 import ops, reference

bitsandbytes = import_bitsandbytes()

SHAPES = [(4096, 4096), (14336, 4096)]  # N, K
OUTLIER_COLUMNS = [1, 77, 500, 1000, 2000, 4000]
RULES = {"absolute 6.0": ("absolute", 6.0), "row_rms 4.0": ("row_rms", 4.0)}


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


def interleaved_medians(functions, repeats):
    """Measures median milliseconds of each function, interleaved, after one warm-up."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def measure(N, K, rows, num_outliers, repeats):
    weight = torch.randn(N, K) / K**0.5
    weight_int8, col_scale = reference.quantize_weight(weight)
    theirs = bitsandbytes.nn.Linear8bitLt(
        K, N, bias=False, has_fp16_weights=False, threshold=6.0
    ).requires_grad_(False)
    theirs.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False)
    theirs = theirs.to("cpu")
    for M in rows:
        x = torch.randn(M, K)
        x.clamp_(-5.5, 5.5)  # no outlier by chance
        x[:, OUTLIER_COLUMNS[:num_outliers]] *= 40.0
        x[:, OUTLIER_COLUMNS[:num_outliers]] += 10.0 * x[:, OUTLIER_COLUMNS[:num_outliers]].sign()
        want = functional.linear(x, weight)
        functions = {"fp32": lambda x=x: functional.linear(x, weight)}
        functions["bitsandbytes"] = lambda x=x: theirs(x)
        errors = {"bitsandbytes": relative_error(theirs(x), want)}
        for name, (rule, threshold) in RULES.items():
            settings = {"outlier_rule": rule, "outlier_threshold": threshold}
            functions[name] = lambda x=x, settings=settings: ops.int8_linear(
                x, weight_int8, col_scale, **settings
            )
            some = slice(0, 8)
            exact = reference.int8_linear(x[some], weight_int8, col_scale, **settings)
            got = functions[name]()
            assert torch.equal(got[some], exact), f"{name} differs from the specification at M={M}"
            errors[name] = relative_error(got, want)
        assert max(errors.values()) < 0.03, errors
        # bitsandbytes takes seconds where the others take milliseconds
        milliseconds = interleaved_medians(functions, max(5, repeats if M <= 8 else repeats // 3))
        yield {
            "N": N,
            "K": K,
            "M": M,
            "outlier_columns": num_outliers,
            "milliseconds": milliseconds,
            "relative_errors": errors,
            "times_fp32": {name: milliseconds["fp32"] / milliseconds[name] for name in RULES},
            "times_bitsandbytes": {
                name: milliseconds["bitsandbytes"] / milliseconds[name] for name in RULES
            },
        }


def main():
    parser = make_parser(__doc__, takes_model=False)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64, 512])
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    info = ops.library_info()
    assert "int8_linear" in info["cpu_ops"], f"the compiled library is missing: {info['error']}"
    print(f"{info['cpu_instruction_set']}, {args.threads} threads; milliseconds (times fp32)")
    print("    N x K       M  outliers      fp32  bitsandbytes     absolute 6.0      row_rms 4.0")
    figures = []
    for N, K in SHAPES:
        for num_outliers in (0, len(OUTLIER_COLUMNS)):
            for figure in measure(N, K, args.rows, num_outliers, args.repeats):
                figures.append(figure)
                ms, times = figure["milliseconds"], figure["times_fp32"]
                ours = "".join(f"{ms[name]:9.2f} ({times[name]:4.1f}x)" for name in RULES)
                print(
                    f"{N:6d}x{K} {figure['M']:6d} {num_outliers:8d} {ms['fp32']:10.2f} "
                    f"{ms['bitsandbytes']:13.2f} {ours}",
                    flush=True,
                )
    setting = {"threads": args.threads, "instruction_set": info["cpu_instruction_set"]}
    write_result("linear", {**setting, "layers": figures}, args.json, args.raw)


if __name__ == "__main__":
    main()
