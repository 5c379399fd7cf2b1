"""Attention over an int8 KV cache: that of the specification on rounded keys, whatever the cut."""

import pytest
import torch

from dist_int8.int8 import kv, plain, reference

HEADS, KV_HEADS, DIM, LENGTH = 6, 2, 16, 24


def caches(num_slots=3):
    shape = (num_slots, KV_HEADS, LENGTH, DIM)
    return [
        kv.Int8KV(torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[:-1])) for _ in range(2)
    ]


def options(kind):
    angles = torch.arange(LENGTH)[:, None] / torch.tensor([1.0, 3.0, 9.0])
    tables = {"cos": angles.cos(), "sin": angles.sin()} if kind == "rotary" else {}
    slopes = {"alibi_slopes": torch.linspace(0.1, 1, HEADS)} if kind == "alibi" else {}
    window = {"window": 5} if kind == "window" else {}
    shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "scale": DIM**-0.5}
    return {**shape, **tables, **slopes, **window}


def qkv_of(num_tokens, seed):
    seeded = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, (HEADS + 2 * KV_HEADS) * DIM, generator=seeded)


def attend(qkv, cache, segments, kind):
    return kv.attention(qkv, *cache, torch.tensor(segments, dtype=torch.int32), **options(kind))


KINDS = pytest.mark.parametrize("kind", ["rotary", "alibi", "window"])


def test_a_token_and_head_has_its_scale():
    x = torch.randn(5, KV_HEADS, DIM) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1.0])[:, None, None]
    values, scale = kv.quantize_heads(x)
    assert values.shape == x.shape and scale.shape == (5, KV_HEADS)
    error = (values * scale[..., None] - x).abs()
    assert torch.all(error <= scale[..., None] / 2 * (1 + 1e-5))
    assert torch.equal(scale, x.abs().amax(-1) / 127)


@KINDS
def test_it_is_attention_over_rounded_keys_and_values(kind):
    """Plain attention in fp32 over what the caches hold after the call, written by its new keys."""
    cache = caches()
    attend(qkv_of(7, 0), cache, [(1, 0, 7)], kind)
    qkv = qkv_of(4, 1)
    got = attend(qkv, cache, [(1, 7, 3), (2, 0, 1)], kind)
    wide = [c.values.float() * c.scale[..., None] for c in cache]
    given = options(kind)
    heads = qkv.view(4, -1, DIM)
    query = heads[:, :HEADS]
    at = torch.tensor([7, 8, 9, 0])
    if kind == "rotary":
        query = plain.rotate(query, given["cos"][at], given["sin"][at])
    new = [torch.stack([c[1, :, 7], c[1, :, 8], c[1, :, 9], c[2, :, 0]]) for c in wide]
    expected = plain.attention(
        torch.cat([query, *new], dim=1).flatten(1),
        wide[0].transpose(2, 3).contiguous(),
        wide[1],
        torch.tensor([(1, 7, 3), (2, 0, 1)], dtype=torch.int32),
        HEADS,
        KV_HEADS,
        given["scale"],
        None,
        None,
        given.get("alibi_slopes"),
        given.get("window", 0),
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    key = heads[:, HEADS : HEADS + KV_HEADS]
    if kind == "rotary":
        key = plain.rotate(key, given["cos"][at], given["sin"][at])
    rounded = reference.dequantize_weight(*reference.quantize_weight(key.flatten(0, 1)))
    assert torch.equal(new[0], rounded.view(new[0].shape))


@KINDS
def test_cuts_and_company_change_no_bit(kind):
    qkv, others = qkv_of(9, 2), qkv_of(14, 3)
    whole = caches()
    alone = attend(qkv, whole, [(0, 0, 9)], kind)
    cut = caches()
    pieces = [attend(qkv[a:b], cut, [(2, a, b - a)], kind) for a, b in ((0, 4), (4, 5), (5, 9))]
    assert torch.equal(torch.cat(pieces), alone)
    company = caches()
    attend(others[:8], company, [(1, 0, 8)], kind)
    mixed = torch.cat([others[8:10], qkv, others[10:]])
    together = attend(mixed, company, [(1, 8, 2), (0, 0, 9), (2, 0, 4)], kind)
    assert torch.equal(together[2:11], alone)
    for one, two in zip(whole, company, strict=True):
        assert torch.equal(one.values[0], two.values[0]) and torch.equal(one.scale[0], two.scale[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    cache = caches()
    qkv = qkv_of(6, 4)
    exact = attend(qkv, caches(), [(0, 0, 6)], "rotary")
    got = attend(qkv.to(dtype), cache, [(0, 0, 6)], "rotary")
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.05)


def test_segments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="segments must cover T=3 tokens of qkv, got 2"):
        attend(qkv_of(3, 0), caches(), [(0, 0, 2)], "alibi")
    with pytest.raises(ValueError, match=r"slot must be in 0\.\.2, got 3"):
        attend(qkv_of(2, 0), caches(), [(3, 0, 2)], "alibi")
    with pytest.raises(ValueError, match=r"positions must be in 0\.\.23, got 23\.\.24"):
        attend(qkv_of(2, 0), caches(), [(0, 23, 2)], "alibi")
