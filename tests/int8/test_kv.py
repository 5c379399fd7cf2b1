"""Attention over an int8 KV cache: the specification's on rounded keys, for any chunking."""

import os
import subprocess
import sys

import pytest
import torch

from dist_int8.int8 import kv, ops, plain, reference
from dist_int8.int8.attention import key_cache_shape
from dist_int8.int8.attention_args import AttentionArgs

# num_heads, num_kv_heads, head_dim, max_tokens, rotary dimensions, ALiBi, window.
SHAPES = [
    (9, 3, 64, 100, 64, False, 0),
    (4, 4, 16, 50, 8, False, 0),
    (8, 2, 20, 37, 0, True, 0),
    (3, 1, 80, 77, 32, False, 7),
    (1, 1, 8, 33, 0, False, 1),
    (6, 2, 128, 300, 128, True, 40),
    (14, 2, 5, 129, 4, True, 16),
]
NUM_SLOTS = 3
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES)


class Case:
    """One attention layer with its tables."""

    def __init__(self, num_heads, num_kv_heads, head_dim, max_tokens, rotary, alibi, window):
        self.num_kv_heads, self.head_dim, self.max_tokens = num_kv_heads, head_dim, max_tokens
        self.num_heads, self.width = num_heads, (num_heads + 2 * num_kv_heads) * head_dim
        seeded = torch.Generator().manual_seed(1)
        angles = torch.rand(max_tokens, rotary // 2, generator=seeded) * 6
        self.settings = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "scale": head_dim**-0.5,
            "cos": angles.cos() if rotary else None,
            "sin": angles.sin() if rotary else None,
            "alibi_slopes": torch.rand(num_heads, generator=seeded) if alibi else None,
            "window": window,
        }

    def qkv(self, num_tokens, seed=0):
        """Rows whose heads differ in size by powers of ten."""
        seeded = torch.Generator().manual_seed(seed)
        x = torch.randn(num_tokens, self.width // self.head_dim, self.head_dim, generator=seeded)
        sizes = torch.randint(-1, 2, x.shape[:2], generator=seeded)
        return (x * 10.0 ** sizes[..., None] / 3).flatten(1)

    def caches(self):
        """A key and a value cache; what was never written is NaN."""
        slots, D, L = (NUM_SLOTS, self.num_kv_heads), self.head_dim, self.max_tokens
        shapes = ((*slots, D, L), (*slots, L, D))
        scale = torch.full((*slots, L), torch.nan)
        return [kv.Int8KV(torch.ones(s, dtype=torch.int8), scale.clone()) for s in shapes]

    def run(self, qkv, segments, caches):
        segments = torch.tensor(segments, dtype=torch.int32)
        return ops.attention(qkv, *caches, segments, AttentionArgs(**self.settings))

    def plain(self, qkv, segments, caches):
        segments = torch.tensor(segments, dtype=torch.int32)
        tensors = (*caches[0], *caches[1])
        return plain.int8_kv_attention(qkv, *tensors, segments, AttentionArgs(**self.settings))

    def new_heads(self, qkv, segments):
        """Rotated query, rotated key and value [T, heads, D] of the tokens of the segments."""
        H, KV = self.num_heads, self.num_kv_heads
        heads = qkv.view(len(qkv), -1, self.head_dim).split([H, KV, KV], dim=1)
        if self.settings["cos"] is None:
            return heads
        at = torch.tensor([p for _, start, count in segments for p in range(start, start + count)])
        tables = self.settings["cos"][at], self.settings["sin"][at]
        return [*(plain.rotate(x, *tables) for x in heads[:2]), heads[2]]

    def widened(self, qkv, segments, caches):
        """`ops.attention` over what int8 caches hold once they hold the tokens of the segments."""
        query, *_ = self.new_heads(qkv, segments)
        keys = caches[0].values * caches[0].scale[:, :, None]
        values = caches[1].values * caches[1].scale[..., None]
        rows = [(slot, slice(start, start + count)) for slot, start, count in segments]
        new_keys = torch.cat([keys[slot, :, :, at].permute(2, 0, 1) for slot, at in rows])
        new_values = torch.cat([values[slot, :, at].transpose(0, 1) for slot, at in rows])
        whole = torch.cat([query, new_keys, new_values], dim=1).flatten(1)
        args = AttentionArgs(**self.settings | {"cos": None, "sin": None})
        segments = torch.tensor(segments, dtype=torch.int32)
        return ops.attention(whole, keys, values, segments, args)


def same_caches(one, two, slot=slice(None)):
    return all(
        torch.equal(ours.values[slot], theirs.values[slot])
        and torch.equal(ours.scale[slot].nan_to_num(-1.0), theirs.scale[slot].nan_to_num(-1.0))
        for ours, theirs in zip(one, two, strict=True)
    )


def test_it_is_compiled():
    assert "int8_kv_attention" in ops.library_info()["cpu_ops"]


def test_every_token_and_head_has_its_own_scale():
    x = torch.randn(5, 2, 16) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1.0])[:, None, None]
    values, scale = plain.quantize_heads(x)
    assert values.shape == x.shape and scale.shape == (5, 2)
    error = (values * scale[..., None] - x).abs()
    assert torch.all(error <= scale[..., None] / 2 * (1 + 1e-5))
    assert torch.equal(scale, x.abs().amax(-1) / 127)


@EACH_SHAPE
def test_it_is_attention_over_rounded_keys_and_values(shape):
    """Of the caches after the call, which hold the new tokens' keys and values, rounded."""
    case = Case(*shape)
    caches = case.caches()
    case.run(case.qkv(17), [(1, 0, 17)], caches)
    qkv, segments = case.qkv(8, seed=1), [(1, 17, 5), (2, 0, 2), (0, 0, 1)]
    got = case.run(qkv, segments, caches)
    for (slot, start, count), end in zip(segments, (5, 7, 8), strict=True):
        tokens, places = slice(end - count, end), slice(start, start + count)
        _, *new = case.new_heads(qkv, segments)
        for cache, x, transposed in zip(caches, new, (True, False), strict=True):
            values, scale = reference.quantize_weight(x[tokens].flatten(0, 1))
            held = cache.values.transpose(2, 3) if transposed else cache.values
            assert torch.equal(held[slot, :, places].transpose(0, 1).flatten(0, 1), values)
            assert torch.equal(cache.scale[slot, :, places].T.flatten(), scale)
    torch.testing.assert_close(got, case.widened(qkv, segments, caches), rtol=1e-5, atol=1e-5)


@EACH_SHAPE
def test_the_plain_version_agrees(shape):
    case = Case(*shape)
    caches, copies = case.caches(), case.caches()
    steps = [
        (case.qkv(14), [(2, 0, 9), (0, 0, 5)]),
        (case.qkv(12, 1), [(2, 9, 1), (0, 5, 7), (1, 0, 4)]),
        (case.qkv(5, 2), [(0, 12, 1), (1, 4, 0), (0, 13, 3), (2, 10, 1)]),
        (case.qkv(3, 3), [(1, 4, 1), (2, 11, 1), (0, 16, 1)]),
    ]
    for qkv, segments in steps:
        got, want = case.run(qkv, segments, caches), case.plain(qkv, segments, copies)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert same_caches(caches, copies)


@EACH_SHAPE
def test_keys_in_groups_do_not_change_a_bit(shape):
    case = Case(shape[0], shape[1], shape[2], shape[3] // 16 * 16, *shape[4:])
    caches, others = case.caches(), case.caches()
    S, KV, D, L = others[0].values.shape
    groups = torch.ones(key_cache_shape(S, KV, D, L, torch.float32, torch.device("cpu")))
    assert groups.shape == (S, KV, L // 16, D, 16)
    others[0] = kv.Int8KV(groups.to(torch.int8), others[0].scale)
    for seed, segments in enumerate([[(2, 0, 9), (0, 0, 5)], [(2, 9, 1), (0, 5, L - 5)]]):
        qkv = case.qkv(sum(count for *_, count in segments), seed)
        assert torch.equal(case.run(qkv, segments, others), case.run(qkv, segments, caches))
    keys = others[0].values.transpose(2, 3).reshape(S, KV, D, L)
    assert same_caches([others[0]._replace(values=keys), others[1]], caches)


@EACH_SHAPE
def test_results_are_the_same_bits_for_any_chunking_and_batch(shape):
    case = Case(*shape)
    last = case.max_tokens - 1
    a, b = case.qkv(last + 1), case.qkv(last + 1, seed=1)
    whole = case.caches()
    alone = case.run(a, [(0, 0, last + 1)], whole)
    assert alone.isfinite().all()
    # a in slot 2 in chunks of 11, 1, 9 and the rest, then its last token, beside parts of b.
    caches = case.caches()
    parts = []
    for i, (start, end) in enumerate([(0, 11), (11, 12), (12, 21), (21, last), (last, last + 1)]):
        other, mine = b[5 * i : 5 * i + 5], a[start:end]
        segments = [(2, start, end - start), (0, 5 * i, 5)]
        if i % 2:
            parts.append(case.run(torch.cat([other, mine]), segments[::-1], caches)[5:])
        else:
            parts.append(case.run(torch.cat([mine, other]), segments, caches)[: end - start])
    assert torch.equal(torch.cat(parts), alone)
    moved = [kv.Int8KV(*(tensor[[2, 0, 1]] for tensor in cache)) for cache in caches]
    assert same_caches(moved, whole, slot=0)


@EACH_SHAPE
def test_the_number_of_threads_changes_no_bit(shape):
    case = Case(*shape)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            caches = case.caches()
            segments = [(slot, 0, case.max_tokens) for slot in range(NUM_SLOTS)]
            results.append((case.run(case.qkv(3 * case.max_tokens), segments, caches), caches))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert same_caches(results[0][1], results[1][1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_non_finite_values_reach_only_tokens_that_attend_to_them(part, bad):
    case = Case(6, 2, 20, 40, 0, False, 4)
    first = {"query": 1, "key": 6, "value": 8}[part] * case.head_dim
    qkv = case.qkv(12)
    clean = case.run(qkv, [(1, 0, 12)], case.caches())
    qkv[5, first + 3] = bad
    caches = case.caches()
    got = case.run(qkv, [(1, 0, 12)], caches)
    seen = torch.zeros(12, 6, dtype=torch.bool)
    if part == "query":
        seen[5, 1] = True
    else:
        seen[5:9, :3] = True  # four tokens see it, and three heads share the key-value head
        cache = caches[part == "value"]
        assert cache.scale[1, 0, 5].isnan() and cache.scale[1, :, :12].isnan().sum() == 1
    assert torch.equal(got.view(12, 6, 20).isnan().all(-1), seen)
    assert torch.equal(got.view(12, 6, 20)[~seen], clean.view(12, 6, 20)[~seen])
    want = case.widened(qkv, [(1, 0, 12)], caches)
    assert torch.equal(got.isnan(), want.isnan())


def test_tiny_and_zero_heads():
    case = Case(2, 2, 16, 40, 0, False, 0)
    qkv = case.qkv(6)
    qkv[2] = 0
    qkv[3] = 1e-42  # its scale would be subnormal
    qkv[4] *= 1e-30
    caches, copies = case.caches(), case.caches()
    got, want = case.run(qkv, [(0, 0, 6)], caches), case.plain(qkv, [(0, 0, 6)], copies)
    assert same_caches(caches, copies) and not caches[0].scale[0, :, 2:4].any()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_halves_are_rounded_to_even():
    case = Case(1, 1, 8, 33, 0, False, 0)
    key = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0])
    caches = case.caches()
    case.run(torch.cat([key, key, key])[None], [(0, 0, 1)], caches)
    expected = [127, 0, 2, 2, 0, -2, -2, -127]
    assert caches[0].values[0, 0, :, 0].tolist() == caches[1].values[0, 0, 0].tolist() == expected


def test_values_near_halves_round_as_specified():
    """Where a product with 1 / scale, or another scale, would round to another integer."""
    case = Case(3, 3, 64, 33, 0, False, 0)
    seeded = torch.Generator().manual_seed(0)
    halves = torch.randint(-127, 127, (33, 9, 64), generator=seeded) + 0.5
    halves[..., 0] = 127
    qkv = (halves * (torch.rand(33, 9, 1, generator=seeded) + 0.1)).flatten(1)
    caches, copies = case.caches(), case.caches()
    case.run(qkv, [(0, 0, 33)], caches)
    case.plain(qkv, [(0, 0, 33)], copies)
    assert same_caches(caches, copies)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    case = Case(*SHAPES[0])
    qkv = case.qkv(6)
    exact = case.run(qkv, [(0, 0, 6)], case.caches())
    got = case.run(qkv.to(dtype), [(0, 0, 6)], case.caches())
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.05)


def test_no_tokens():
    case = Case(*SHAPES[0])
    caches = case.caches()
    assert case.run(case.qkv(0), [(0, 3, 0)], caches).shape == (0, 9 * 64)
    assert same_caches(caches, case.caches())


def test_it_compiles_without_graph_breaks():
    case = Case(*SHAPES[1])
    segments = torch.tensor([[0, 0, 5]], dtype=torch.int32)

    def attend(qkv, key_cache, value_cache):
        args = AttentionArgs(**case.settings)
        return ops.attention(qkv, key_cache, value_cache, segments, args) + 1

    eager = attend(case.qkv(5), *case.caches())
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.equal(compiled(case.qkv(5), *case.caches()), eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "segments, message",
    [
        ([(3, 0, 2)], r"segments\[0\] slot must be in 0..2, got 3"),
        ([(-1, 0, 2)], r"slot must be in 0..2, got -1"),
        ([(0, 0, 1), (0, 100, 1)], r"segments\[1\] positions must be in 0..99, got 100..100"),
        ([(0, 99, 2)], r"positions must be in 0..99, got 99..100"),
        ([(0, -1, 2)], r"positions must be in 0..99, got -1..0"),
        ([(0, 0, -1), (0, 0, 3)], r"positions must be"),
        ([(0, 0, 1)], r"segments must cover T=2 tokens of qkv, got 1"),
    ],
)
def test_bad_segments_raise_and_write_nothing(segments, message, dtype):
    case = Case(*SHAPES[0])
    caches = case.caches()
    with pytest.raises(ValueError, match=f"^int8_kv_attention: .*{message}"):
        case.run(case.qkv(2).to(dtype), segments, caches)
    assert same_caches(caches, case.caches())


def test_positions_stay_inside_the_rotary_table():
    case = Case(*SHAPES[0])
    case.settings["cos"] = case.settings["cos"][:40]
    case.settings["sin"] = case.settings["sin"][:40]
    with pytest.raises(ValueError, match=r"positions must be in 0..39, got 39..40"):
        case.run(case.qkv(2), [(0, 39, 2)], case.caches())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key_cache": torch.zeros(3, 3, 64, 100)}, "key_cache must be int8, got float32"),
        (
            {"key_cache": torch.zeros(3, 2, 64, 100, dtype=torch.int8)},
            r"key_cache must be \[S, KV=3, D, L\], got \[3, 2, 64, 100\]",
        ),
        (
            {"value_cache": torch.zeros(3, 3, 64, 100, dtype=torch.int8)},
            r"value_cache must be \[S=3, KV=3, L=100, D=64\], got \[3, 3, 64, 100\]",
        ),
        (
            {"value_cache": torch.zeros(3, 3, 64, 100, dtype=torch.int8).transpose(2, 3)},
            "value_cache must be contiguous",
        ),
        (
            {"key_scale": torch.zeros(3, 3, 99)},
            r"key_scale must be \[S=3, KV=3, L=100\], got \[3, 3, 99\]",
        ),
        ({"value_scale": torch.zeros(3, 3, 100).half()}, "value_scale must be float32"),
        ({"qkv": torch.zeros(2, 64)}, r"qkv must be \[T, \(H\+2\*KV\)\*D=960\], got \[2, 64\]"),
        ({"num_heads": 8}, "num_heads must be a multiple of num_kv_heads, got 8 and 3"),
        ({"window": -1}, "window must be >= 0, got -1"),
        ({"sin": None}, "cos and sin must be given together"),
        ({"alibi_slopes": torch.ones(8)}, r"alibi_slopes must be \[H=9\], got \[8\]"),
        ({"segments": torch.zeros(1, 3)}, "segments must be int32, got float32"),
    ],
)
def test_bad_arguments(change, message):
    case = Case(*SHAPES[0])
    (key_cache, key_scale), (value_cache, value_scale) = case.caches()
    given = {
        "qkv": case.qkv(2),
        "key_cache": key_cache,
        "key_scale": key_scale,
        "value_cache": value_cache,
        "value_scale": value_scale,
        "segments": torch.tensor([[0, 0, 2]], dtype=torch.int32),
        **case.settings,
        **change,
    }
    keys = kv.Int8KV(given.pop("key_cache"), given.pop("key_scale"))
    values = kv.Int8KV(given.pop("value_cache"), given.pop("value_scale"))
    args = AttentionArgs(**{name: given[name] for name in AttentionArgs._fields})
    with pytest.raises(ValueError, match=f"^int8_kv_attention: {message}"):
        ops.attention(given["qkv"], keys, values, given["segments"], args)


@pytest.mark.parametrize("instruction_set", ["avx512_vnni", "avx2", "generic"])
def test_other_instruction_sets(instruction_set):
    """This file again, with the kernels of other instruction sets."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "not instruction_sets and not compiles and not bad_arguments"]
    environment = os.environ | {"DIST_INT8_CPU_ISA": instruction_set}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("one kind", "must be of one kind"),
        ("short values", "value_cache must be"),
        ("other dtype", "must be torch.bfloat16|must be float32"),
        ("narrow qkv", "qkv must be"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused_before_anything_is_written(
    dtype, change, said
):
    args = ops.AttentionArgs(4, 2, 0.25)
    qkv, segments = torch.ones(2, 8 * 16, dtype=dtype), torch.tensor([[0, 0, 2]]).int()
    keys = torch.zeros(3, 2, 16, 32, dtype=dtype)
    values = torch.zeros(3, 2, 32, 16, dtype=dtype)
    if change == "one kind":
        values = kv.Int8KV(values.char(), torch.zeros(3, 2, 32))
    elif change == "short values":
        values = values[:, :, :31]
    elif change == "other dtype":
        keys, values = keys.half(), values.half()
    else:
        qkv = qkv[:, 1:]
    with pytest.raises((ValueError, RuntimeError), match=said):
        ops.attention(qkv, keys, values, segments, args)
    assert not keys.any()


def test_a_rule_that_is_refused_writes_nothing():
    keys, values = torch.zeros(1, 2, 16, 32), torch.zeros(1, 2, 32, 16)
    segments, args = torch.tensor([[0, 0, 2]]).int(), ops.AttentionArgs(4, 2, 0.25)
    for rule in (("none", 0.0, None, 3), ("some", 0.0), ("absolute", -1.0)):
        with pytest.raises(ValueError, match="must be"):
            ops.attention_quantize(torch.ones(2, 128), keys, values, segments, args, *rule)
    assert not keys.any() and not values.any()
