"""A decoder block on a GPU: near the CPU's, without a host synchronisation, in a CUDA graph."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_int8.int8 import ops
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.block import DecoderBlock, PositionTables
from dist_int8.models.rotary import alibi_slopes
from dist_int8.models.spec import BlockSpec

SIZES = {"hidden_size": 256, "intermediate_size": 640, "num_heads": 8, "head_dim": 32}
BLOCKS = {
    "bloom": {
        "norm": "layer",
        "activation": "bloom_gelu",
        "num_kv_heads": 8,
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    "llama": {"norm": "rms", "gated": True, "num_kv_heads": 2},
    "gpt_neox": {
        "norm": "layer",
        "activation": "gelu",
        "num_kv_heads": 8,
        "parallel_residual": True,
    },
    "opt_350m": {"norm": "layer", "activation": "relu", "num_kv_heads": 8, "norm_after": True},
}
MAX_TOKENS = 64
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class Case:
    """A block with random int8 weights, caches with some history, one new token per sequence."""

    def __init__(self, name, dtype, batch, device):
        self.spec = BlockSpec(**SIZES, norm_eps=1e-5, **BLOCKS[name])
        generator = torch.Generator().manual_seed(0)
        block = DecoderBlock(self.spec)
        for parameter in block.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2
            parameter.data.normal_(generator=generator).mul_(scale)
        for child_name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, child_name, Int8Linear.from_linear(child, 4.0, "row_rms"))
        self.block = block.to(dtype).to(device)
        heads, D = self.spec.num_kv_heads, self.spec.head_dim

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        self.keys = random(batch, heads, D, MAX_TOKENS)
        self.values = random(batch, heads, MAX_TOKENS, D)
        self.x, self.residual = random(batch, 256), random(batch, 256)
        positions = [(7 * b + 3) % MAX_TOKENS for b in range(batch)]
        segments = torch.tensor([(b, p, 1) for b, p in enumerate(positions)], dtype=torch.int32)
        self.segments = ops.Segments.of(segments, device)
        self.tables = PositionTables(None, None, alibi_slopes(8).to(device))

    def run(self):
        out, residual = self.block(
            self.x, self.residual, self.segments, self.keys, self.values, self.tables
        )
        return out if residual is None else out + residual


@contextlib.contextmanager
def no_synchronisation(device):
    """Turns every host synchronisation within the context into an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("batch", [1, 8, 33])
@pytest.mark.parametrize("name", BLOCKS)
@torch.inference_mode()
def test_block_is_close_to_the_cpu_without_synchronisation(device, name, batch, dtype):
    case, twin = Case(name, dtype, batch, device), Case(name, dtype, batch, torch.device("cpu"))
    case.run()  # what is made once may wait
    with no_synchronisation(device):
        got = case.run()
    want = twin.run()
    error = (got.cpu().float() - want.float()).norm() / want.float().norm()
    assert error < TOLERANCES[dtype], error
    torch.testing.assert_close(case.keys.cpu(), twin.keys, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("batch", [1, 8, 33])
@pytest.mark.parametrize("name", ["bloom", "llama"])
@torch.inference_mode()
def test_a_captured_block_replays_on_new_inputs(device, gpu_only, name, batch):
    case = Case(name, torch.float16, batch, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        case.x.copy_(torch.randn(case.x.shape, generator=generator).half())
        positions = case.segments.places[:, 1]
        positions.copy_((positions + 1) % MAX_TOKENS)
        keys, values = case.keys.clone(), case.values.clone()
        want = case.run().clone()
        want_keys = case.keys.clone()
        case.keys.copy_(keys)
        case.values.copy_(values)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, want) and torch.equal(case.keys, want_keys)


CHAIN = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import test_block, torch
digest = hashlib.sha256()
for batch in (1, 8, 20):
    case = test_block.Case("llama", torch.bfloat16, batch, torch.device("cuda"))
    with torch.inference_mode():
        case.run()
        torch.cuda.synchronize()
        graph, outs = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):  # kernel after kernel, without gaps
            for _ in range(20):  # one that read too early would read the step before
                outs.append(case.run())
                case.x.copy_(outs[-1] / outs[-1].abs().max())
        for _ in range(10):
            graph.replay()
            for out in outs:
                digest.update(out.cpu().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_kernels_that_begin_early_give_the_same_bits(gpu_only):
    digests = []
    for early in ("0", "1"):
        environment = os.environ | {"DIST_INT8_EARLY_LAUNCH": early}
        command = [sys.executable, "-c", CHAIN, str(Path(__file__).parent)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        digests.append(done.stdout)
    assert digests[0] == digests[1]


@torch.inference_mode()
def test_block_runs_on_another_stream(device, gpu_only):
    case = Case("bloom", torch.bfloat16, 8, device)
    want = case.run()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = case.run()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
