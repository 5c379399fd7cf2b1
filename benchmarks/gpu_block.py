"""How long does one BLOOM-176B block take to decode a token, and does its memory meet the plan?

    python benchmarks/gpu_block.py [--batches 1 8 32] [--contexts 128 2048]
    python benchmarks/gpu_block.py --device cpu --small     # tries the script out, measures nothing

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

import torch
from results import make_parser, write_result
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
FLOOR_US = 574.0  # int8 weights of the block at 4.3 TB/s
DTYPE = torch.float16


def make_block(small, device):
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
                outlier_rule="row_rms",
                outlier_threshold=4.0,
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

    def __init__(self, block, batch, context, device):
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
        self.segments = ops.decode_segments(torch.tensor(rows, dtype=torch.int32), self.keys, None)
        self.tables = PositionTables(None, None, alibi_slopes(spec.num_heads).to(device))

    def run(self):
        return self.block(self.x, self.residual, self.segments, self.keys, self.values, self.tables)

    def parts(self):
        """The calls that the block makes, each alone on inputs of the same size."""
        block, spec = self.block, self.block.spec
        rows, _ = block.attention_norm.before(block.qkv, self.x, self.residual)
        qkv = block.qkv(rows)
        heads = {"num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads}

        def attend():
            return ops.attention(
                qkv,
                self.keys,
                self.values,
                self.segments,
                **heads,
                scale=block.scale,
                alibi_slopes=self.tables.alibi_slopes,
            )

        context = attend()
        inner = block.up(block.mlp_norm.before(block.up, self.x, self.residual)[0])

        def activate():
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
def no_synchronisation(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def check(step, device):
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
def measure(block, batch, context, limits, device):
    step = Step(block, batch, context, device)
    error = check(step, device)
    spec = block.spec
    weights = block_bytes(spec, Formats(int8=True, float_size=2, vocab_size=2))
    cache = batch * context * kv_bytes_per_token(spec, 2)
    figure = {"batch": batch, "context": context, "fused_against_plain": error}
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
            "step": torch.cuda.max_memory_allocated() - held,
        }
    figure["graph"] = microseconds([step.run], device)
    figure["eager"] = microseconds([step.run], device, graph=False)
    parts = {name: microseconds([call], device) for name, call in step.parts().items()}
    figure["parts"] = {name: part["median_us"] for name, part in parts.items()}
    floor = (weights + cache) / limits["copy_tb_per_s"] / 1e6
    figure["floor_us"] = floor
    figure["times_floor"] = figure["graph"]["median_us"] / floor
    return figure


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny block: only tries this out")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 2048])
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device)
    else:
        block_module.FUSED_DEVICES.add(device.type)
    torch.manual_seed(0)
    limits = device_limits(device, args.small)
    print(limits)
    block = make_block(args.small, device)
    figures = []
    print("  batch  context   graph us   eager us   floor us   x floor   peak GB   parts us")
    for context in args.contexts:
        for batch in args.batches:
            figure = measure(block, batch, context, limits, device)
            figures.append(figure)
            peak = figure.get("bytes", {}).get("peak", 0) / 1e9
            parts = ", ".join(f"{name} {us:.0f}" for name, us in figure["parts"].items())
            print(
                f"{batch:7d} {context:8d} {figure['graph']['median_us']:10.1f} "
                f"{figure['eager']['median_us']:10.1f} {figure['floor_us']:10.1f} "
                f"{figure['times_floor']:9.2f} {peak:9.2f}   {parts}",
                flush=True,
            )
    record = {
        **environment(device),
        "limits": limits,
        "floor_of_weights_us": FLOOR_US,
        "steps": figures,
    }
    if not args.small or args.json:
        write_result("gpu_block", record, args.json)


if __name__ == "__main__":
    main()
