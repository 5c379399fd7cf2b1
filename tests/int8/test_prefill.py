"""Prompts through flash attention: its call, against what the op is documented to compute.

torch has the op on GPUs alone. Here it is replaced by its definition in float64, written from the
documentation of flash attention (`flash_attn_varlen_func`); tests/gpu runs the op itself.
"""

import math

import pytest
import torch

from dist_int8.int8 import plain, prefill
from dist_int8.int8.attention import split_attention
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.kv import Int8KV, list_tensors
from dist_int8.int8.segments import Segments

H, KV, D, L = 6, 2, 16, 64
NUM_SLOTS = 5
MIXED = [(2, 40, 1), (0, 0, 1), (3, 5, 7), (1, 0, 30), (4, 63, 1)]
FRESH = [(0, 0, 4), (1, 0, 30), (3, 0, 1)]


def flash(query, key, value, query_ends, key_ends, max_q, max_k, dropout, causal, debug, **how):
    """flash_attn_varlen_func in float64, one sequence and head at a time; causal to the bottom
    right, window (left, right) around the diagonal, bias -slope * distance."""
    assert (dropout, causal, debug) == (0.0, True, False)
    assert key.stride(-1) == value.stride(-1) == query.stride(-1) == 1
    out = torch.empty(query.shape, dtype=torch.float64)
    lengths = zip(query_ends.diff().tolist(), key_ends.diff().tolist(), strict=True)
    assert max_q == int(query_ends.diff().max()) and max_k == int(key_ends.diff().max())
    for b, (num_queries, num_keys) in enumerate(lengths):
        q = query[query_ends[b] : query_ends[b + 1]].double()
        k = key[key_ends[b] : key_ends[b + 1]].double().repeat_interleave(H // KV, 1)
        v = value[key_ends[b] : key_ends[b + 1]].double().repeat_interleave(H // KV, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * how["scale"]
        distance = torch.arange(num_queries)[:, None] + num_keys - num_queries
        distance = distance - torch.arange(num_keys)
        if how["alibi_slopes"] is not None:
            scores = scores - how["alibi_slopes"].double().view(-1, 1, 1) * distance.abs()
        left = how["window_size_left"]
        hidden = (distance < 0) | (distance > (math.inf if left < 0 else left))
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[query_ends[b] : query_ends[b + 1]] = torch.einsum("hqk,khd->qhd", weights, v)
    return out.to(query.dtype), None, None, None, None


@pytest.fixture(autouse=True)
def flash_on_cpu(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(prefill, "is_usable", lambda *_: True)


def make_args(half=0, slopes=False, window=0):
    generator = torch.Generator().manual_seed(half)
    angles = torch.rand(L, half, generator=generator) * 6
    return AttentionArgs(
        H,
        KV,
        D**-0.5,
        angles.cos() if half else None,
        angles.sin() if half else None,
        torch.rand(H, generator=generator) if slopes else None,
        window,
    )


def tensors(num_tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, (H + 2 * KV) * D), (NUM_SLOTS, KV, D, L), (NUM_SLOTS, KV, L, D)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run_both(rows, args, dtype=torch.float32, int8=False):
    """(out, keys, values) of the split attention and of plain torch without a split."""
    rows = torch.tensor(rows, dtype=torch.int32)
    qkv, *caches = tensors(int(rows[:, 2].sum()), dtype)

    def copies():
        if not int8:
            return [cache.clone() for cache in caches]
        return [
            Int8KV((cache * 40).clamp(-127, 127).char(), torch.full((NUM_SLOTS, KV, L), 0.025))
            for cache in caches
        ]

    ours, theirs = copies(), copies()
    got = split_attention(
        qkv.clone(), *ours, Segments.of(rows), args, decode=plain.attend, prefill=prefill.attention
    )
    expected = plain.attend(qkv, *theirs, rows, args)
    return [got, *list_tensors(*ours)], [expected, *list_tensors(*theirs)]


@pytest.mark.parametrize("rows", [MIXED, MIXED[2:], MIXED[:2], FRESH], ids=str)
@pytest.mark.parametrize(
    "how", [{}, {"half": 8}, {"half": 3}, {"slopes": True}, {"half": 8, "window": 9}], ids=str
)
def test_a_split_batch_is_that_of_plain_torch(rows, how):
    got, expected = run_both(rows, make_args(**how))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("int8", [False, True])
def test_16_bit_results_are_near(int8):
    got, expected = run_both(MIXED, make_args(half=8), torch.bfloat16, int8)
    torch.testing.assert_close(got[0], expected[0], rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rows", [MIXED, MIXED[2:], FRESH], ids=str)
@pytest.mark.parametrize("how", [{}, {"half": 8, "slopes": True, "window": 9}], ids=str)
def test_a_split_batch_sees_rounded_keys_and_values(rows, how):
    got, expected = run_both(rows, make_args(**how), int8=True)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)
    floating, _ = run_both(rows, make_args(**how))
    assert not torch.allclose(got[0], floating[0], rtol=1e-3)


def test_prompts_that_begin_read_no_cache(monkeypatch):
    monkeypatch.setattr(prefill, "gather", None)  # calling it would fail
    run_both(FRESH, make_args(half=8))
    with pytest.raises(TypeError):
        run_both(MIXED, make_args(half=8))


def test_what_flash_cannot_do_is_plain_torch(monkeypatch):
    monkeypatch.setattr(prefill, "is_usable", lambda *_: False)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", None)
    got, expected = run_both(MIXED, make_args(half=8, window=5))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


def test_the_check_before_first_use_sees_a_wrong_op(monkeypatch):
    monkeypatch.setattr(prefill, "H", 2, raising=False)
    for has_slopes in (False, True):
        assert _error(monkeypatch, {}, has_slopes) < 1e-2
    # an op without slopes, one aligned to the top left, one that ignores the window
    assert _error(monkeypatch, {"alibi_slopes": None}, True) > 2e-2
    assert _error(monkeypatch, {"window_size_left": -1}, False) > 2e-2


def _error(monkeypatch, forced, has_slopes):
    def other(*args, **how):
        return flash(*args, **(how | forced))

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.aten, "_flash_attention_forward", other)
        patch.setitem(globals(), "H", 2)
        patch.setitem(globals(), "KV", 1)
        return prefill.measure_error(torch.device("cpu"), torch.bfloat16, D, has_slopes)


class TestUsable:
    @pytest.fixture(autouse=True)
    def real_op(self, monkeypatch):
        monkeypatch.undo()

    def test_the_op_of_this_torch_takes_what_it_is_given(self):
        """Fails when a torch moves it: then compare its source with `prefill.attend`."""
        assert prefill.has_known_schema()

    def test_cpus_have_no_flash_attention(self):
        assert not prefill.is_usable(torch.device("cpu"), torch.bfloat16, 64, False)
