"""Attention of decoding on a GPU against plain torch on the CPU."""

import pytest
import torch

from dist_int8.int8 import ops, plain, prefill
from dist_int8.int8.kv import Int8KV

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


class Case:
    def __init__(self, dtype, H, KV, D, L, positions, half=0, slopes=False, window=0, int8=False):
        generator = torch.Generator().manual_seed(H * D + L)
        num_slots = len(positions) + 1
        slots = torch.randperm(num_slots, generator=generator).tolist()
        self.segments = torch.tensor(
            [(slot, p, 1) for slot, p in zip(slots, positions, strict=False)], dtype=torch.int32
        )

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.qkv = random(len(positions), (H + 2 * KV) * D)
        self.keys, self.values = random(num_slots, KV, D, L), random(num_slots, KV, L, D)
        for slot, position, _ in self.segments.tolist():
            self.keys[slot, :, :, position:] = torch.nan
            self.values[slot, :, position:] = torch.nan
        if int8:  # what was never written is NaN here too
            self.keys, self.values = _round(self.keys, 2), _round(self.values, 3)
        angles = torch.rand(L, half, generator=generator) * 6
        self.settings = {
            "num_heads": H,
            "num_kv_heads": KV,
            "scale": D**-0.5,
            "cos": angles.cos() if half else None,
            "sin": angles.sin() if half else None,
            "alibi_slopes": torch.rand(H, generator=generator) / 8 if slopes else None,
            "window": window,
        }

    def run(self, attention, device):
        def to(value):
            return value.to(device) if isinstance(value, torch.Tensor) else value

        keys, values = _copy(self.keys, device), _copy(self.values, device)
        settings = {name: to(value) for name, value in self.settings.items()}
        args = ops.AttentionArgs(**settings)
        out = attention(self.qkv.to(device), keys, values, self.segments, args)
        caches = [*keys, *values] if isinstance(keys, Int8KV) else [keys, values]
        return [tensor.cpu() for tensor in (out, *caches)]


def _round(cache, dim):
    """A cache [S, KV, ...] in int8, with a scale per token: `dim` is that of its D features."""
    scale = cache.float().abs().amax(dim) / 127
    return Int8KV((cache.float() / scale.unsqueeze(dim)).nan_to_num(7).round().char(), scale)


def _copy(cache, device):
    if isinstance(cache, Int8KV):
        return Int8KV(*(_copy(tensor, device) for tensor in cache))
    return cache.clone().to(device)


@pytest.mark.parametrize("int8", [False, True], ids=["as-qkv", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"H": 4, "KV": 4, "D": 128, "L": 2048, "slopes": True},
        {"H": 8, "KV": 2, "D": 128, "L": 4096, "half": 64},
        {"H": 16, "KV": 2, "D": 128, "L": 1024, "half": 64},
        {"H": 6, "KV": 2, "D": 80, "L": 512, "half": 16},
        {"H": 5, "KV": 1, "D": 64, "L": 304, "half": 32, "window": 100},
        {"H": 12, "KV": 1, "D": 64, "L": 512, "half": 32},
        {"H": 2, "KV": 2, "D": 96, "L": 20000, "slopes": True},
        {"H": 2, "KV": 1, "D": 20, "L": 77},
        {"H": 2, "KV": 2, "D": 256, "L": 640, "window": 300},
    ],
    ids=lambda s: f"{s['H']}x{s['KV']}x{s['D']}x{s['L']}",
)
def test_decode_equals_plain_torch(device, dtype, sizes, int8):
    L = sizes["L"]
    positions = [0, 1, L // 2, L - 1, min(255, L - 1), min(256, L - 1), 63]
    case = Case(dtype, positions=positions, int8=int8, **sizes)
    got = case.run(ops.attention, device)
    want = case.run(plain.attend, "cpu")
    # a score with slope * position added is rounded to fp32 at that size
    tolerance = TOLERANCES[dtype] + (2e-8 * L if "slopes" in sizes else 0.0)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("int8", [False, True], ids=["as-qkv", "int8"])
@pytest.mark.parametrize("rule", [("none", 0.0, None, 64), ("row_rms", 4.0, [3, 200], 0)], ids=str)
def test_attention_quantize_equals_the_two_ops(device, gpu_only, int8, rule):
    case = Case(torch.bfloat16, 8, 2, 64, 512, [3, 400, 77], half=32, int8=int8)
    name, threshold, hot, rotation = rule
    hot = None if hot is None else torch.tensor(hot, dtype=torch.int32, device=device)
    quantization = (name, threshold, hot, rotation)
    fused = []

    def attend_quantized(*arguments):
        fused.append(ops.attention_quantize(*arguments, *quantization))
        return fused[0].row_scale

    caches = case.run(attend_quantized, device)[1:]
    out, *others = case.run(ops.attention, device)
    expected = ops.quantize_rows(out.to(device), *quantization)
    for mine, theirs in zip(fused[0], expected, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(caches, others, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_segments_on_the_gpu_and_on_the_cpu_are_the_same(device, gpu_only):
    case = Case(torch.float16, 8, 2, 64, 512, [3, 400, 77], half=32)
    want = case.run(ops.attention, device)
    case.segments = ops.Segments.of(case.segments, device)
    for mine, theirs in zip(case.run(ops.attention, device), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_decode_attention_is_batch_invariant(device, gpu_only):
    case = Case(torch.bfloat16, 16, 4, 128, 2048, [2047, 5, 300, 1024], half=64)
    together = case.run(ops.attention, device)[0]
    whole, rows = case.segments, case.qkv
    for b in range(4):
        case.segments, case.qkv = whole[b : b + 1], rows[b : b + 1]
        assert torch.equal(case.run(ops.attention, device)[0], together[b : b + 1])


@pytest.mark.parametrize("segment", [(9, 5, 1), (-1, 5, 1), (0, 64, 1), (0, -1, 1)])
def test_an_invalid_segment_on_the_gpu_gives_nan(device, gpu_only, segment):
    case = Case(torch.float16, 2, 2, 64, 64, [10, 20])
    want = case.run(ops.attention, device)
    case.segments[0] = torch.tensor(segment)
    slot, position, _ = case.segments[1].tolist()
    case.segments = ops.Segments.of(case.segments, device)  # which looks at no slot or position
    out, keys, _ = case.run(ops.attention, device)
    assert out[0].isnan().all() and torch.equal(out[1], want[0][1])
    expected = case.keys.clone()
    expected[slot, :, :, position] = keys[slot, :, :, position]
    torch.testing.assert_close(keys, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("counts", [(5, 3), (1, 6, 1, 1)], ids=["prefill", "prefill-and-decode"])
def test_prefill_equals_plain_torch(device, counts):
    case = Case(torch.float32, 4, 2, 32, 64, [0, 8, 30, 63][: len(counts)], half=16)
    case.segments[:, 2] = torch.tensor(counts)
    generator = torch.Generator().manual_seed(0)
    case.qkv = torch.randn(sum(counts), 8 * 32, generator=generator)
    case.keys.nan_to_num_(0.0)
    case.values.nan_to_num_(0.0)
    for mine, theirs in zip(
        case.run(ops.attention, device), case.run(plain.attention, "cpu"), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("int8", [False, True], ids=["as-qkv", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [(5, 300), (1, 1, 200, 1, 33)], ids=["prefill", "mixed"])
@pytest.mark.parametrize(
    "how",
    [
        {"H": 8, "KV": 8, "D": 128, "slopes": True},
        {"H": 8, "KV": 2, "D": 128, "half": 64},
        {"H": 4, "KV": 2, "D": 80, "half": 16, "window": 40},
    ],
    ids=["bloom", "llama", "window"],
)
def test_prompts_go_through_flash_attention(device, gpu_only, dtype, counts, how, int8):
    positions = [0, 8, 130, 500, 63][: len(counts)]
    case = Case(dtype, L=512, positions=positions, **how)
    case.keys.nan_to_num_(0.0)
    case.values.nan_to_num_(0.0)
    if int8:
        case.keys, case.values = _round(case.keys, 2), _round(case.values, 3)
    case.segments[:, 2] = torch.tensor(counts)
    width = case.qkv.shape[1]
    generator = torch.Generator().manual_seed(0)
    case.qkv = torch.randn(sum(counts), width, generator=generator).to(dtype)
    assert prefill.is_usable(device, dtype, how["D"], "slopes" in how)
    out, *caches = case.run(ops.attention, device)
    expected, *plain_caches = case.run(plain.attend, "cpu")
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(caches, plain_caches, strict=True):
        # integers may differ by one where the rotation was rounded otherwise
        least = 1 if mine.dtype == torch.int8 else 1e-5
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=least)
