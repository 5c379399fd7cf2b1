"""Every op once on small shapes: the program that compute-sanitizer runs in test_sanitizer.py.

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitized.py
"""

import os
import sys

import torch

from dist_int8.int8 import ops, reference
from dist_int8.int8.activations import ACTIVATIONS
from dist_int8.int8.kv import Int8KV
from dist_int8.int8.layouts import LAYOUTS, transform_layout

DEVICE = os.environ.get("DIST_INT8_GPU_TESTS", "cuda")


def attend(D: int, L: int, dtype: torch.dtype) -> None:
    """Decoding and prompts, over caches of either kind."""
    args = ops.AttentionArgs(6, 2, D**-0.5)
    shapes = ((3, 2, D, L), (3, 2, L, D))
    floating = [torch.zeros(shape, device=DEVICE, dtype=dtype) for shape in shapes]
    scale = torch.zeros(3, 2, L, device=DEVICE)
    int8 = [Int8KV(cache.char(), scale.clone()) for cache in floating]
    for caches in (floating, int8):
        for counts in ((1, 1), (1, 9)):
            qkv = torch.randn(sum(counts), 10 * D, device=DEVICE, dtype=dtype)
            starts = (L - 1, 3)
            rows = [(s, start, n) for s, start, n in zip((2, 0), starts, counts, strict=True)]
            segments = torch.tensor(rows, dtype=torch.int32)
            ops.attention(qkv.clone(), *caches, segments, args)
            ops.attention_quantize(qkv, *caches, segments, args, "none", 0.0, None, 64)


def main() -> None:
    torch.manual_seed(0)
    settings = ("row_rms", 4.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # the last two are for CUTLASS kernels: both tiles of compute capability 9.0
        shapes = ((1, 64, 128), (5, 33, 72), (17, 65, 577), (40, 256, 512))
        for M, N, K in (*shapes, (136, 136, 128), (520, 4096, 128)):
            x = torch.randn(M, K, device=DEVICE, dtype=dtype)
            x[:, ::50] *= 40
            weight_int8, col_scale = reference.quantize_weight(torch.randn(N, K, device=DEVICE))
            hot = torch.arange(16, dtype=torch.int32, device=DEVICE) * 3
            hot_weight = torch.randn(N, 16, device=DEVICE, dtype=dtype)
            norm_weight = torch.randn(K, device=DEVICE, dtype=dtype)
            bias = torch.randn(N, device=DEVICE, dtype=dtype)
            residual = torch.randn(M, N, device=DEVICE, dtype=dtype)
            rows = ops.quantize_rows(x, *settings, hot)
            ops.int8_matmul(
                rows, weight_int8, col_scale, bias, hot_weight=hot_weight, residual=residual
            )
            ops.int8_linear(
                x, weight_int8, col_scale, outlier_rule=settings[0], outlier_threshold=settings[1]
            )
            if dtype != torch.float32:
                ops.int8_weight_linear(x, weight_int8, col_scale, bias, residual)
            for kind in ("rms", "layer"):
                ops.add_norm(x, None, norm_weight, None, 1e-5, kind)
                ops.add_norm_quantize(x, x, norm_weight, norm_weight, 1e-5, kind, *settings, hot)
            for rotation in (64, 1024):  # one plane, as by default
                rotated = ("none", 0.0, hot, rotation)
                rows = ops.quantize_rows(x, *rotated)
                ops.int8_matmul(rows, weight_int8, col_scale, bias, hot_weight=hot_weight)
                ops.add_norm_quantize(x, x, norm_weight, None, 1e-5, "rms", *rotated)
            for name in ACTIVATIONS:
                ops.activation_quantize(x, name, *settings)
            ops.silu_mul(x[:, : K // 2 * 2])
            ops.silu_mul_quantize(x[:, : K // 2 * 2], *settings)
        for D, L in ((64, 512), (128, 272), (256, 48), (20, 77)):
            attend(D, L, dtype)
    for layout in LAYOUTS:
        x = torch.randint(-127, 128, (65, 259), dtype=torch.int8, device=DEVICE)
        stored = transform_layout(x, "row", layout)
        assert torch.equal(transform_layout(stored, layout, "row", (65, 259)), x)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every op ran")


if __name__ == "__main__":
    sys.exit(main())
