"""How long does one BLOOM-176B block take to decode a token, and does its memory meet the plan?

    python benchmarks/gpu/block.py [--batches 1 8 32] [--contexts 128 2048] [--records FILE]
    python benchmarks/gpu/block.py --device cpu --small     # tries the script out, measures nothing

One block with random int8 weights (d = 14336, 112 heads, 2.47 GB) in fp16, one new token for each
sequence of the batch, attending to `context` positions. Microseconds are medians over replays of a
CUDA graph of the block; its weights alone are forty times the L2 cache. The floor is the time that
the copy bandwidth measured here needs for the weights and for the keys and values. The parts are
measured the same way, each alone. Peak memory is what torch allocated at most around one eager
step, against the bytes that dist_int8.partition counts for the block and its KV cache.

Correctness comes first: the block that quantizes inside norms and activations is near the one that
does not, and the step makes no host synchronisation.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cells import Cells
from records import Records, make_parser
from timing import device_limits, environment, microseconds
from torch import nn

from dist_int8.int8 import ops
from dist_int8.int8.linear import Int8Linear
from dist_int8.models import block as block_module
from dist_int8.models.block import DecoderBlock, PositionTables
from dist_int8.models.rotary import alibi_slopes
from dist_int8.models.spec import BlockSpec
from dist_int8.partition.memory import Formats, block_bytes, kv_bytes_per_token

BLOOM = {"hidden_size": 14336, "intermediate_size": 57344, "num_heads": 112, "head_dim": 128}
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_heads": 8, "head_dim": 32}
DTYPE = torch.float16


def make_block(small: bool, device: torch.device) -> DecoderBlock:
    sizes = SMALL if small else BLOOM
    spec = BlockSpec(
        **sizes,
        num_kv_heads=sizes["num_heads"],
        norm="layer",
        norm_eps=1e-5,
        activation="bloom_gelu",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )
    with torch.device("meta"):
        block = DecoderBlock(spec)
    for name, child in list(block.named_children()):
        if isinstance(child, nn.Linear):
            layer = Int8Linear(
                child.in_features,
                child.out_features,
                outlier_rule="none",
                outlier_threshold=0.0,
                rotation=64,
                device="meta",
                dtype=DTYPE,
            ).to_empty(device=device)
            layer.weight_int8.random_(-127, 128)
            layer.col_scale.fill_(child.in_features**-0.5 / 73)  # uniform bytes: 73 RMS
            layer.bias.normal_(std=0.02)
            setattr(block, name, layer)
        else:
            norm = child.to_empty(device=device).to(DTYPE)
            norm.weight.data.normal_(mean=1.0, std=0.1)
            norm.bias.data.normal_(std=0.1)
    return block.requires_grad_(False)


class Step:
    """One new token for each of `batch` sequences of `context` positions, its own included."""

    def __init__(self, block: DecoderBlock, batch: int, context: int, device: torch.device) -> None:
        self.block, spec = block, block.spec
        self.hidden = spec.hidden_size
        shape = (batch, spec.num_kv_heads, spec.head_dim, context)
        self.keys = torch.empty(shape, dtype=DTYPE, device=device).normal_()
        self.values = torch.empty(
            (batch, spec.num_kv_heads, context, spec.head_dim), dtype=DTYPE, device=device
        ).normal_()
        self.x = torch.randn(batch, self.hidden, device=device).to(DTYPE)
        self.x[:, :: self.hidden // 6] *= 30.0  # outlier features
        self.residual = torch.randn(batch, self.hidden, device=device).to(DTYPE)
        rows = [(slot, context - 1, 1) for slot in range(batch)]
        self.segments = ops.Segments.of(torch.tensor(rows, dtype=torch.int32), device)
        self.tables = PositionTables(None, None, alibi_slopes(spec.num_heads).to(device))

    def run(self) -> Any:
        return self.block(self.x, self.residual, self.segments, self.keys, self.values, self.tables)

    def parts(self) -> dict[str, Callable[[], Any]]:
        """The calls that the block makes, each alone on inputs of the same size."""
        block, spec = self.block, self.block.spec
        rows, _ = block.attention_norm.before(block.qkv, self.x, self.residual)
        qkv = block.qkv(rows)
        args = ops.AttentionArgs(
            spec.num_heads,
            spec.num_kv_heads,
            block.scale,
            alibi_slopes=self.tables.alibi_slopes,
        )

        def attend() -> torch.Tensor:
            return ops.attention(qkv, self.keys, self.values, self.segments, args)

        context = attend()
        inner = block.up(block.mlp_norm.before(block.up, self.x, self.residual)[0])

        def activate() -> Any:
            if not block_module._takes_rows(block.down, inner):
                return block.activation(inner)
            return ops.activation_quantize(inner, spec.activation, *block.down.quantization)

        activated = activate()
        return {
            "norm and quantize": lambda: block.attention_norm.before(
                block.qkv, self.x, self.residual
            ),
            "qkv": lambda: block.qkv(rows),
            "attention": attend,
            "attention output, quantization included": lambda: block.attention_output(context),
            "up": lambda: block.up(rows),
            "activation and quantize": activate,
            "down": lambda: block.down(activated),
        }


@contextlib.contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def check(step: Step, device: torch.device) -> float:
    """The quantizing path is near the plain one; nothing in a step waits for the GPU."""
    fused = step.run()[0].float()
    with no_synchronisation(device):
        step.run()
    devices = set(block_module.FUSED_DEVICES)
    block_module.FUSED_DEVICES.clear()
    try:
        plain = step.run()[0].float()
    finally:
        block_module.FUSED_DEVICES.update(devices)
    error = ((fused - plain).norm() / plain.norm()).item()
    assert fused.isfinite().all() and error < 1e-2, error
    return error


@torch.inference_mode()
def measure(
    block: DecoderBlock,
    batch: int,
    context: int,
    limits: dict[str, float],
    device: torch.device,
) -> dict[str, Any]:
    step = Step(block, batch, context, device)
    error = check(step, device)
    spec = block.spec
    weights = block_bytes(spec, Formats(int8=True, float_size=2, vocab_size=2))
    cache = batch * context * kv_bytes_per_token(spec, 2)
    figure: dict[str, Any] = {"fused_against_plain": error}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step.run()
        torch.cuda.synchronize()
        figure["bytes"] = {
            "weights_planned": weights,
            "cache_planned": cache,
            "held": held,  # weights, cache and the inputs of the step
            "peak": torch.cuda.max_memory_allocated(),
        }
    figure["graph_us"] = microseconds([step.run], device)["median_us"]
    figure["eager_us"] = microseconds([step.run], device, graph=False)["median_us"]
    figure["parts_us"] = {
        name: microseconds([call], device)["median_us"] for name, call in step.parts().items()
    }
    figure["floor_us"] = (weights + cache) / limits["copy_tb_per_s"] / 1e6
    figure["times_floor"] = figure["graph_us"] / figure["floor_us"]
    return figure


def describe(figure: dict[str, Any]) -> str:
    peak = figure.get("bytes", {}).get("peak", 0) / 1e9
    parts = ", ".join(f"{name} {us:.0f}" for name, us in figure["parts_us"].items())
    return (
        f"batch {figure['batch']:3d}  context {figure['context']:5d}"
        f"  graph {figure['graph_us']:9.1f} us  eager {figure['eager_us']:9.1f}"
        f"  floor {figure['floor_us']:9.1f}  x floor {figure['times_floor']:5.2f}"
        f"  peak {peak:5.2f} GB  {parts}"
    )


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 2048])
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(torch.cuda.current_device())
    else:
        block_module.FUSED_DEVICES.add(device.type)
    torch.manual_seed(0)
    records = Records(args.records, "block")
    cells = Cells(records, args.skip_tried)
    limits = device_limits(device, args.small)
    records.add("environment", limits=limits, **environment(device))
    print(limits, flush=True)
    block = make_block(args.small, device)
    for context in args.contexts:
        for batch in args.batches:

            def measured(batch: int = batch, context: int = context) -> dict[str, Any]:
                return measure(block, batch, context, limits, device)

            found = cells.run("decode", {"batch": batch, "context": context}, measured)
            if found is not None:
                print(describe(found), flush=True)
    return cells.status()


if __name__ == "__main__":
    sys.exit(main())
