"""The bodies of the CUDA attention of decoding, in the emulator, against plain torch."""

import subprocess

import numpy
import pytest
import torch

from dist_int8.int8 import plain
from dist_int8.int8.attention_args import AttentionArgs

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module")
def program(compile_program):
    return compile_program("attention", sanitize=True)


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


class Case:
    """Random queries, keys, values and caches full of numbers that no kernel may use."""

    def __init__(self, dtype, places, H, KV, D, L, half=0, slopes=False, window=0, slots=3):
        generator = torch.Generator().manual_seed(H * D + L)
        self.dtype, self.H, self.KV, self.D, self.L = dtype, H, KV, D, L
        self.window, self.scale, self.num_slots = window, D**-0.5, slots
        self.segments = torch.tensor([(s, p, 1) for s, p in places], dtype=torch.int32)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.qkv = random(len(places), (H + 2 * KV) * D)
        self.key_cache = random(slots, KV, D, L)
        self.value_cache = random(slots, KV, L, D)
        for slot, position in places:  # stale entries past the end of a sequence
            if 0 <= slot < slots and 0 <= position < L:
                self.key_cache[slot, :, :, position:] = torch.nan
                self.value_cache[slot, :, position:] = torch.nan
        angles = torch.rand(L, half, generator=generator) * 6
        self.cos, self.sin = (angles.cos(), angles.sin()) if half else (None, None)
        self.slopes = torch.rand(H, generator=generator) / 8 if slopes else None

    def expected(self):
        keys, values = self.key_cache.clone(), self.value_cache.clone()
        tables = (self.cos, self.sin, self.slopes, self.window)
        args = AttentionArgs(self.H, self.KV, self.scale, *tables)
        out = plain.attention(self.qkv, keys, values, self.segments, args)
        return out, keys, values

    def run(self, program, split=0):
        half = 0 if self.cos is None else self.cos.shape[1]
        numbers = [len(self.segments), self.H, self.KV, self.D, half, self.num_slots, self.L]
        numbers += [self.L, self.window, self.scale, int(self.slopes is not None), split]
        data = as_bytes(self.qkv) + as_bytes(self.key_cache) + as_bytes(self.value_cache)
        data += as_bytes(self.segments)
        for table in (self.cos, self.sin, self.slopes):
            data += b"" if table is None else as_bytes(table)
        command = [program, str(TYPES[self.dtype]), *map(str, numbers)]
        done = subprocess.run(command, input=data, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        got, at = [], 0
        shapes = [self.qkv.shape if split == -1 else (len(self.segments), self.H * self.D)]
        shapes += [self.key_cache.shape, self.value_cache.shape]
        for shape in shapes:
            count = int(numpy.prod(shape)) * self.dtype.itemsize
            part = numpy.frombuffer(done.stdout, numpy.uint8, count, at).copy()
            got.append(torch.from_numpy(part).view(self.dtype).view(shape))
            at += count
        return got

    def check(self, program, split=0):
        got, expected = self.run(program, split), self.expected()
        tolerance = TOLERANCES[self.dtype]
        torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
        for mine, theirs in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("H", "KV", "D", "half", "slopes"),
    [(2, 2, 128, 0, True), (4, 2, 64, 32, False), (5, 1, 80, 8, False), (6, 2, 32, 16, True)],
    ids=["bloom", "rotary", "group-of-5", "group-of-3"],
)
def test_decode_equals_plain_torch(program, dtype, H, KV, D, half, slopes):
    places = [(1, 0), (0, 299), (2, 256)]
    Case(dtype, places, H, KV, D, L=304, half=half, slopes=slopes).check(program)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [1, 7, 300])
def test_window(program, dtype, window):
    places = [(0, 599), (1, 3), (2, 256)]
    Case(dtype, places, 2, 1, 16, L=600, window=window).check(program)


@pytest.mark.parametrize(("D", "L"), [(20, 64), (16, 63), (7, 300)])
def test_rows_that_are_not_vectors(program, D, L):
    for dtype in TYPES:
        Case(dtype, [(0, L - 1), (2, 5)], 3, 1, D, L=L, half=D // 4).check(program)


def test_a_large_head(program):
    Case(torch.float16, [(0, 40)], 1, 1, 256, L=64).check(program)


def test_long_splits_take_several_tiles(program):
    case = Case(torch.bfloat16, [(0, 1030), (1, 511)], 2, 2, 16, L=1040, slopes=True)
    case.check(program, split=512)
    case.check(program, split=2048)


def test_a_slot_in_two_segments_sees_its_older_token(program):
    case = Case(torch.float32, [(0, 10)], 2, 1, 16, L=32)
    case.segments = torch.tensor([(0, 10, 1), (0, 11, 1)], dtype=torch.int32)
    case.qkv = torch.randn(2, 4 * 16, generator=torch.Generator().manual_seed(0))
    case.check(program)


def test_tokens_are_batch_invariant(program):
    case = Case(torch.float16, [(0, 280), (1, 17), (2, 299)], 4, 2, 32, L=304, half=8)
    together = case.run(program)[0]
    for row in range(3):
        alone = Case(torch.float16, [(0, 280), (1, 17), (2, 299)], 4, 2, 32, L=304, half=8)
        alone.segments, alone.qkv = case.segments[row : row + 1], case.qkv[row : row + 1]
        assert torch.equal(alone.run(program)[0], together[row : row + 1])


@pytest.mark.parametrize("segment", [(3, 5, 1), (-1, 5, 1), (0, 32, 1), (0, -1, 1), (0, 5, 2)])
def test_a_segment_that_is_not_valid_gives_nan_and_touches_nothing(program, segment):
    case = Case(torch.float32, [(1, 4), (2, 9)], 2, 1, 16, L=32)
    expected = case.run(program)
    case.segments[0] = torch.tensor(segment)
    out, keys, _ = case.run(program)
    assert out[0].isnan().all() and torch.equal(out[1], expected[0][1])
    before = case.key_cache.clone()
    before[2, :, :, 9] = keys[2, :, :, 9]
    torch.testing.assert_close(keys, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("H", "KV", "D", "half"), [(4, 2, 64, 32), (3, 1, 20, 5), (2, 2, 16, 0)])
def test_tokens_of_a_prompt_are_placed_and_rotated(program, dtype, H, KV, D, half):
    places = [(1, p) for p in range(7, 12)] + [(0, 0), (2, 63)]
    case = Case(dtype, places, H, KV, D, L=64, half=half)
    got = case.run(program, split=-1)
    qkv, keys, values = (t.clone() for t in (case.qkv, case.key_cache, case.value_cache))
    args = AttentionArgs(H, KV, 1.0, case.cos, case.sin)
    plain.place_tokens(qkv, keys, values, case.segments, args)
    for mine, theirs in zip(got, (qkv, keys, values), strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    assert half == 0 or not torch.equal(qkv, case.qkv)
    case.segments[2, 1] = 64  # past the end: left alone
    got = case.run(program, split=-1)
    assert torch.equal(got[0][2], case.qkv[2])
    assert torch.equal(got[1][1, :, :, 10].nan_to_num(), keys[1, :, :, 10].nan_to_num())
