"""The bodies of the CUDA attention of decoding, in the emulator, against plain torch.

The program also runs attention_quantize, and fails where that is not attention and quantize_rows.
"""

import subprocess

import numpy
import pytest
import torch

from dist_int8.int8 import plain
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.kv import Int8KV

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
CACHES = ["as-qkv", "int8"]


@pytest.fixture(scope="module")
def program(compile_program):
    return compile_program("attention", sanitize=True)


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


class Case:
    """Random queries, keys, values and caches full of numbers that no kernel may use."""

    def __init__(
        self, dtype, places, H, KV, D, L, half=0, slopes=False, window=0, slots=3, cache="as-qkv"
    ):
        generator = torch.Generator().manual_seed(H * D + L)
        self.dtype, self.H, self.KV, self.D, self.L = dtype, H, KV, D, L
        self.window, self.scale, self.num_slots = window, D**-0.5, slots
        self.segments = torch.tensor([(s, p, 1) for s, p in places], dtype=torch.int32)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.qkv = random(len(places), (H + 2 * KV) * D)
        keys, values = random(slots, KV, D, L), random(slots, KV, L, D)
        if cache == "int8":
            integers = [(t.float() * 40).clamp(-127, 127).round().char() for t in (keys, values)]
            scales = [torch.rand(slots, KV, L, generator=generator) / 20 for _ in range(2)]
            self.caches = [integers[0], scales[0], integers[1], scales[1]]
        else:
            self.caches = [keys, values]
        for slot, position in places:  # stale entries past the end of a sequence
            if 0 <= slot < slots and 0 <= position < L:
                for stale in (keys[slot, :, :, position:], values[slot, :, position:]):
                    stale.fill_(torch.nan)
                for scale in self.caches[1::2] if cache == "int8" else ():
                    scale[slot, :, position:] = torch.nan
        angles = torch.rand(L, half, generator=generator) * 6
        self.cos, self.sin = (angles.cos(), angles.sin()) if half else (None, None)
        self.slopes = torch.rand(H, generator=generator) / 8 if slopes else None

    @property
    def is_int8(self):
        return len(self.caches) == 4

    @property
    def args(self):
        tables = (self.cos, self.sin, self.slopes, self.window)
        return AttentionArgs(self.H, self.KV, self.scale, *tables)

    def expected(self):
        """out and the caches, in the program's order."""
        caches = [tensor.clone() for tensor in self.caches]
        attend = plain.int8_kv_attention if self.is_int8 else plain.attention
        out = attend(self.qkv, *caches, self.segments, self.args)
        return [out, *(caches[::2] + caches[1::2] if self.is_int8 else caches)]

    def run(self, program, split=0, warps=0):
        half = 0 if self.cos is None else self.cos.shape[1]
        numbers = [len(self.segments), self.H, self.KV, self.D, half, self.num_slots, self.L]
        numbers += [self.L, self.window, self.scale, int(self.slopes is not None), split, warps]
        caches = self.caches[::2] + self.caches[1::2] if self.is_int8 else self.caches
        given = [self.qkv, *caches, self.segments, self.cos, self.sin, self.slopes]
        data = b"".join(as_bytes(tensor) for tensor in given if tensor is not None)
        command = [program, str(TYPES[self.dtype]), str(int(self.is_int8)), *map(str, numbers)]
        done = subprocess.run(command, input=data, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        got, at = [], 0
        like = [self.qkv if split == -1 else self.qkv[:, : self.H * self.D], *caches]
        for tensor in like:
            count = tensor.numel() * tensor.element_size()
            part = numpy.frombuffer(done.stdout, numpy.uint8, count, at).copy()
            got.append(torch.from_numpy(part).view(tensor.dtype).view(tensor.shape))
            at += count
        return got

    def check(self, program, split=0, warps=0):
        got, expected = self.run(program, split, warps), self.expected()
        tolerance = TOLERANCES[self.dtype]
        torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
        for mine, theirs in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("H", "KV", "D", "half", "slopes"),
    [
        (2, 2, 128, 0, True),
        (4, 2, 64, 32, False),
        (5, 1, 80, 8, False),
        (6, 2, 32, 16, True),
        (11, 1, 16, 4, True),
        (8, 8, 128, 64, False),
    ],
    ids=["bloom", "rotary", "group-of-5", "group-of-3", "group-of-11", "rotated-by-1024"],
)
def test_decode_equals_plain_torch(program, dtype, H, KV, D, half, slopes, cache):
    places = [(1, 0), (0, 299), (2, 256)]
    Case(dtype, places, H, KV, D, L=304, half=half, slopes=slopes, cache=cache).check(program)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [1, 7, 300])
def test_window(program, dtype, window, cache):
    places = [(0, 599), (1, 3), (2, 256)]
    Case(dtype, places, 2, 1, 16, L=608, window=window, cache=cache).check(program)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_a_large_head_with_as_many_warps_as_fit(program, warps, cache):
    for dtype in TYPES:
        Case(dtype, [(0, 100)], 1, 1, 256, L=112, half=128, cache=cache).check(program, 0, warps)


@pytest.mark.parametrize("cache", CACHES)
def test_long_splits_take_several_tiles(program, cache):
    places = [(0, 1030), (1, 511)]
    case = Case(torch.bfloat16, places, 2, 2, 16, L=1040, slopes=True, cache=cache)
    case.check(program, split=512)
    case.check(program, split=2048)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits_lose_nothing(program, dtype, cache):
    """Against float64, from queries and weights of many sizes: the error is that of the output."""
    case = Case(dtype, [(0, 63)], 8, 1, 64, L=64, cache=cache)
    case.qkv = (case.qkv * torch.logspace(-3, 2, 10).repeat_interleave(64)).to(dtype)
    out, *_ = case.run(program)
    wide = Case(torch.float32, [(0, 63)], 8, 1, 64, L=64, cache=cache)
    wide.qkv = case.qkv.float()
    wide.caches = [t.clone() if case.is_int8 else t.float() for t in case.caches]
    exact, *_ = wide.expected()
    unit = torch.finfo(dtype).eps / 2
    assert ((out - exact).abs() <= 1.05 * unit * exact.abs() + 1e-6).all()


def test_scales_of_values_may_differ_by_any_factor(program):
    case = Case(torch.float32, [(0, 303), (1, 200)], 4, 2, 32, L=304, cache="int8")
    scales = case.caches[3]
    scales *= 10.0 ** torch.randint(-6, 7, scales.shape, generator=torch.Generator().manual_seed(3))
    scales[1, :, :100] = 0.0  # keys and values that are all zero
    got, expected = case.run(program)[0], case.expected()[0]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("cache", CACHES)
def test_tokens_are_batch_invariant(program, cache):
    places = [(0, 280), (1, 17), (2, 299)]
    case = Case(torch.float16, places, 4, 2, 32, L=304, half=8, cache=cache)
    together = case.run(program)[0]
    for row in range(3):
        alone = Case(torch.float16, places, 4, 2, 32, L=304, half=8, cache=cache)
        alone.segments, alone.qkv = case.segments[row : row + 1], case.qkv[row : row + 1]
        assert torch.equal(alone.run(program)[0], together[row : row + 1])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("segment", [(3, 5, 1), (-1, 5, 1), (0, 32, 1), (0, -1, 1), (0, 5, 2)])
def test_a_segment_that_is_not_valid_gives_nan_and_touches_nothing(program, segment, cache):
    case = Case(torch.float32, [(1, 4), (2, 9)], 2, 1, 16, L=32, cache=cache)
    expected = case.run(program)
    case.segments[0] = torch.tensor(segment)
    out, keys, *_ = case.run(program)
    assert out[0].isnan().all() and torch.equal(out[1], expected[0][1])
    before = case.caches[0].clone()
    before[2, :, :, 9] = keys[2, :, :, 9]
    torch.testing.assert_close(keys, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("position", [20, 32, 64, 256])
def test_a_nan_in_a_token_gives_nan_there_alone(program, dtype, position, cache):
    """Also where the token's key is the first of a tile, a warp or a split."""
    case = Case(dtype, [(1, position), (2, 9)], 2, 1, 16, L=272, cache=cache)
    case.qkv[0, 2 * 16] = torch.nan  # of its key
    out, *_ = case.run(program)
    assert out[0].isnan().all() and not out[1].isnan().any()


@pytest.mark.parametrize("size", [1e-33, 1e-35, 1e-37])
def test_values_of_any_size(program, size):
    case = Case(torch.float32, [(1, 40)], 2, 1, 16, L=64, cache="int8")
    case.caches[3][1, :, :40] = size
    case.qkv[:, 3 * 16 :] *= 100 * size
    out, expected = case.run(program)[0], case.expected()[0]
    least = 1e-5 * float(expected.abs().max()) + 1e-39  # of subnormal numbers
    torch.testing.assert_close(out, expected, rtol=0, atol=least)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("H", "KV", "D", "half"), [(4, 2, 64, 32), (3, 1, 20, 5), (2, 2, 16, 0)])
def test_tokens_of_a_prompt_are_placed_and_rotated(program, dtype, H, KV, D, half, cache):
    places = [(1, p) for p in range(7, 12)] + [(0, 0), (2, 63)]
    case = Case(dtype, places, H, KV, D, L=64, half=half, cache=cache)
    got = case.run(program, split=-1)
    qkv, caches = case.qkv.clone(), [tensor.clone() for tensor in case.caches]
    both = [Int8KV(*caches[:2]), Int8KV(*caches[2:])] if case.is_int8 else caches
    plain.place_tokens(qkv, *both, case.segments, AttentionArgs(H, KV, 1.0, case.cos, case.sin))
    placed = caches[::2] + caches[1::2] if case.is_int8 else caches
    for mine, theirs in zip(got, (qkv, *placed), strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    assert (half == 0 and cache != "int8") or not torch.equal(qkv, case.qkv)
    case.segments[2, 1] = 64  # past the end: left alone
    got = case.run(program, split=-1)
    assert torch.equal(got[0][2], case.qkv[2])
    assert torch.equal(got[1][1, :, :, 10].nan_to_num(), placed[0][1, :, :, 10].nan_to_num())
