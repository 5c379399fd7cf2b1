"""What is this card, and does each op give there what it gives on the CPU?

    python benchmarks/gpu/card.py [--device cpu]

One call of every op on small shapes, one for each kernel of the int8 product, in bf16, against its
CPU twin: quantized planes bit for bit, each row of floating results within TOLERANCE of its norm.
An op that fails does not keep the others from being tried; one that breaks the CUDA context or
hangs ends this process, which first_light.py starts again behind it.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cells import Cells
from records import Records, make_parser
from timing import environment
from torch import Tensor

from dist_int8.int8 import ops, prefill, reference
from dist_int8.int8.kv import Int8KV
from dist_int8.int8.layouts import transform_layout

DTYPE = torch.bfloat16
TOLERANCE = 2e-2  # of a row's norm: bf16 has 8 bits, and some ops round twice
# a rule with a second plane; the rotated cases have one
RULE: Any = {"outlier_rule": "row_rms", "outlier_threshold": 4.0}
SETTINGS = tuple(RULE.values())
# M, N, K of one product for each kernel of compute capability 9.0 (gemm_tiles.h in csrc)
PRODUCTS = {
    "small": (4, 512, 1024),
    "tiled": (64, 512, 1024),
    "wgmma 128": (256, 512, 1024),
    "wgmma 256": (640, 4096, 1024),
}
HEADS = ops.AttentionArgs(num_heads=8, num_kv_heads=2, scale=64**-0.5)
# what the other steps import; a bundle brings the first two
NEEDED = ("pydantic", "bitsandbytes", "transformers", "safetensors", "typer", "cuda.bindings")
ON_CPU_ALONE = {"prepare_blocks", "decoder_blocks"}

Case = tuple[str, Callable[..., Any], tuple[Any, ...]]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator)


def rows_of(M: int, K: int) -> Tensor:
    x = random(M, K)
    x[:, ::97] *= 40
    return x.to(DTYPE)


def cases() -> Iterator[Case]:
    """(op, call, arguments on the CPU); a call gets its tensors on the device that is tried."""
    x, weight = rows_of(33, 1024), random(1024).to(DTYPE)
    yield "quantize_rows", lambda x: ops.quantize_rows(x, *SETTINGS), (x,)
    hot = torch.arange(0, 1024, 64, dtype=torch.int32)
    for rotation in (64, 1024):
        rotated = lambda x, hot, size=rotation: ops.quantize_rows(x, "none", 0.0, hot, size)  # noqa: E731
        yield f"quantize_rows, rotated by {rotation}", rotated, (x, hot)
    for name, (M, N, K) in PRODUCTS.items():
        int8, scale = reference.quantize_weight(random(N, K) / K**0.5)
        bias = random(N).to(DTYPE)
        call = lambda x, *more: ops.int8_linear(x, *more, **RULE)  # noqa: E731
        yield f"int8_linear, {name}", call, (rows_of(M, K), int8, scale, bias)
        hot_weight = random(N, len(hot)).to(DTYPE) / K**0.5
        arguments = (rows_of(M, K), int8, scale, bias, hot, hot_weight)
        yield f"int8_linear, rotated, {name}", rotated_linear, arguments
    int8, scale = reference.quantize_weight(random(512, 1024) / 32)
    residual = random(33, 512).to(DTYPE)

    def product(x: Tensor, int8: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
        return ops.int8_matmul(ops.quantize_rows(x, *SETTINGS), int8, scale, residual=residual)

    yield "int8_matmul", product, (x, int8, scale, residual)
    yield "int8_weight_linear", ops.int8_weight_linear, (x, int8, scale)
    yield "linear", ops.linear, (x, random(512, 1024).to(DTYPE))
    yield "norm", lambda *a: ops.add_norm(*a, None, 1e-5, "rms")[0], (x, None, weight)
    yield "add_norm", lambda *a: ops.add_norm(*a, 1e-5, "layer")[0], (x, x, weight, weight)
    yield "silu_mul", ops.silu_mul, (x,)
    # what these quantize a GPU may round otherwise than a CPU, so what the rows stand for counts
    fused = (None, 1e-5, "rms", *SETTINGS)
    yield (
        "add_norm_quantize",
        lambda *a: values(ops.add_norm_quantize(*a, *fused)[0]),
        (x, x, weight),
    )
    yield "silu_mul_quantize", lambda x: values(ops.silu_mul_quantize(x, *SETTINGS)), (x,)
    gelu = lambda x: values(ops.activation_quantize(x, "gelu", *SETTINGS))  # noqa: E731
    yield "activation_quantize", gelu, (x,)
    for name, counts in (("decode", (1, 1)), ("prefill", (5, 1))):
        yield f"attention, {name}", attend, (random(sum(counts), 12 * 64).to(DTYPE), counts)
    qkv = random(2, 12 * 64).to(DTYPE)
    yield "int8_kv_attention", attend_int8, (qkv, (1, 1))
    yield "attention_quantize", lambda *a: values(attend(*a, SETTINGS)), (qkv, (1, 1))
    yield "place_tokens", place, (random(6, 12 * 64).to(DTYPE),)
    logits = 3 * random(4, 32_000)
    yield "sample_tokens", draw, (logits,)
    yield "penalize_logits", penalize, (logits,)
    matrix = torch.randint(-127, 128, (65, 259), dtype=torch.int8)
    yield "transform_layout", lambda x: transform_layout(x, "row", "col_ampere"), (matrix,)


def rotated_linear(x: Tensor, *layer: Tensor) -> Tensor:
    """int8_linear as by default: rotated, one plane, hot columns."""
    int8, scale, bias, hot, hot_weight = layer
    settings: Any = {"outlier_rule": "none", "outlier_threshold": 0.0, "rotation": 64}
    return ops.int8_linear(x, int8, scale, bias, hot_columns=hot, hot_weight=hot_weight, **settings)


def values(rows: reference.QuantizedRows) -> Tensor:
    """What quantized rows stand for, fp32 [M, K]."""
    planes = rows.x_int8.float()
    if len(rows.x_high):
        planes = planes + 128.0 * rows.x_high.float()
    return planes * rows.row_scale[:, None]


def segments_of(counts: tuple[int, ...]) -> Tensor:
    rows = [(slot, 30 + slot, count) for slot, count in enumerate(counts)]
    return torch.tensor(rows, dtype=torch.int32)


def attend(qkv: Tensor, counts: tuple[int, ...], quantization: Any = None) -> Any:
    keys, cache = random(2, 2, 64, 96).to(qkv), random(2, 2, 96, 64, seed=1).to(qkv)
    arguments = (qkv, keys, cache, segments_of(counts), HEADS)
    if quantization is None:
        return ops.attention(*arguments)
    return ops.attention_quantize(*arguments, *quantization)


def attend_int8(qkv: Tensor, counts: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def cache(*shape: int) -> Int8KV:
        int8 = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        return Int8KV(int8.to(qkv.device), torch.full((2, 2, 96), 0.01, device=qkv.device))

    return ops.attention(qkv, cache(2, 2, 64, 96), cache(2, 2, 96, 64), segments_of(counts), HEADS)


def place(qkv: Tensor) -> Tensor:
    """What qkv and the keys become."""
    keys, cache = random(2, 2, 64, 96).to(qkv), random(2, 2, 96, 64, seed=1).to(qkv)
    angles = torch.arange(96.0, device=qkv.device)[:, None] / torch.arange(1, 33, device=qkv.device)
    heads = HEADS._replace(cos=angles.cos(), sin=angles.sin())
    places = ops.Segments.of(segments_of((5, 1)), qkv.device).places
    placed = qkv.clone()
    prefill.place_tokens(placed, keys, cache, places, heads)
    return torch.cat([placed.flatten(), keys.flatten(), cache.flatten()]).float()[None]


def sampling_settings(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, lengths and settings of four sequences: greedy, warm, top-k and top-p, penalized."""
    rows = [
        [0.0, 0, 1, 0, 1, 0, 0, 0],
        [1.0, 0, 1, 0.01, 1, 0, 0, 0],
        [0.7, 50, 0.9, 0, 1, 0, 0, 0],
        [0.0, 0, 1, 0, 1.3, 0.5, 0.1, 20],
    ]
    slots = torch.arange(4, dtype=torch.int32, device=logits.device)
    settings = torch.tensor(rows, dtype=torch.float64, device=logits.device)
    return slots, slots * 30 + 10, settings


def draw(logits: Tensor) -> Tensor:
    seeds = torch.arange(4, device=logits.device)
    return ops.sample_tokens(logits, *sampling_settings(logits), seeds).float()


def penalize(logits: Tensor) -> Tensor:
    history = torch.arange(4 * 128, dtype=torch.int32).view(4, 128).to(logits.device) % 99
    penalized = logits.clone()
    ops.penalize_logits(penalized, *sampling_settings(logits), history)
    return penalized


def moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def error_of(got: Any, want: Any) -> float:
    """Largest |got - want| / |want| of a row; 0 or infinity for integers and quantized rows."""
    if isinstance(want, tuple):
        return max(map(error_of, got, want))
    if want.numel() == 0:
        return 0.0
    if not want.is_floating_point() or want.dim() == 1:
        return 0.0 if torch.equal(got.cpu(), want) else float("inf")
    difference = (got.cpu().double() - want.double()).norm(dim=1)
    return float((difference / want.double().norm(dim=1).clamp(min=1e-30)).max())


@torch.inference_mode()
def check(case: Case, device: torch.device) -> dict[str, Any]:
    """How far the op is from its CPU twin. Raises AssertionError where it is another function."""
    name, call, arguments = case
    got = call(*(moved(argument, device) for argument in arguments))
    error = error_of(got, call(*arguments))
    assert error <= TOLERANCE, f"{name} differs from its CPU twin by {error:.1e} of a row"
    return {"error": error}


def main() -> int:
    args = make_parser(__doc__).parse_args()
    records = Records(args.records, "card")
    cells = Cells(records, args.skip_tried)
    device = torch.device(args.device)
    for package in NEEDED:
        with cells.guard({"package": package}):
            importlib.import_module(package)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"card: torch {torch.__version__} sees no GPU")
        return 1
    found = environment(device)
    records.add("environment", **found)
    print(*(f"{key}: {value}" for key, value in found.items()), sep="\n", flush=True)
    if device.type == "cuda" and "int8_matmul" not in found["library"]["cuda_ops"]:
        print(f"card: the library has no CUDA kernels: {found['library']}")
        return 1
    num_good = 0
    for case in cases():
        checked = cells.run("op", {"op": case[0]}, lambda case=case: check(case, device))  # type: ignore[misc]
        if checked is not None:
            num_good += 1
            print(f"{checked['op']:24s} ok   error {checked['error']:.1e}", flush=True)
    print(f"{num_good} ops as on the CPU")
    return cells.status()


if __name__ == "__main__":
    sys.exit(main())
