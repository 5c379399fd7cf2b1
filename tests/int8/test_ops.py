"""The compiled ops against torch, transformers and the specification; batch invariance."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from dist_int8.int8 import checks, ops, plain, reference
from dist_int8.int8 import rows as rows_module
from dist_int8.int8.activations import ACTIVATIONS
from dist_int8.int8.attention import key_cache_shape
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.registry import OPS

RULES = [("none", 0.0), ("absolute", 6.0), ("absolute", 2.0), ("row_rms", 4.0), ("row_rms", 1.5)]
RULES += [("all", 0.0), ("absolute", 0.0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (M, K, N): one row, odd sizes, several register tiles, several blocks of rows.
SHAPES = [(1, 64, 8), (1, 7, 3), (5, 100, 17), (37, 576, 50), (8, 1536, 64), (3, 33, 1), (0, 8, 4)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rows_with_outliers(M, K, dtype=torch.float32):
    """Gaussian rows; one of zeros, one with two large elements, one with few large columns."""
    x = torch.randn(M, K)
    if M > 4:
        x[1] = 0
        x[2, 0], x[2, K // 2] = 300.0, -70.0
        x[3, :: max(1, K // 6)] *= 30
    return x.to(dtype)


def test_the_library_is_loaded():
    info = ops.library_info()
    assert info["path"].endswith("_ops.so") and info["error"] is None
    assert info["cpu_instruction_set"] in ("amx", "avx512_vnni", "avx2", "generic")
    assert {"quantize_rows", "int8_linear", "linear", "attention"} <= set(info["cpu_ops"])


def assert_same_rows(got, want):
    for name, ours, theirs in zip(got._fields, got, want, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


class TestQuantizeRows:
    @pytest.mark.parametrize("rule, threshold", RULES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_the_specification(self, rule, threshold, dtype):
        for M, K, _ in SHAPES:
            x = rows_with_outliers(M, K, dtype)
            for hot in (None, torch.tensor([0, K // 3], dtype=torch.int32)):
                got = ops.quantize_rows(x, rule, threshold, hot)
                want = reference.quantize_rows(x, rule, threshold, hot)
                assert_same_rows(got, want)

    def test_flags_of_tiles_in_wide_rows(self):
        x = torch.randn(4, 5000).bfloat16()
        x[0, 4999] = x[1, 2048] = x[2, 2047] = x[2, 64 * 31] = 300.0
        for rule, threshold in RULES:
            got = ops.quantize_rows(x, rule, threshold)
            assert_same_rows(got, reference.quantize_rows(x, rule, threshold))
            num_high = 0 if checks.check_outlier_rule(rule, threshold) == "none" else 4
            assert got.high_tiles.shape == (num_high, 3)

    def test_ties_round_to_even(self):
        x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
        x_int8, _, row_scale, _, _ = ops.quantize_rows(x, "none", 0.0)
        assert row_scale.item() == 1.0
        assert x_int8.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_row_that_is_not_finite_becomes_nan_alone(self, bad):
        x = torch.randn(3, 70)
        x[1, 69] = bad
        x_int8, x_high, row_scale, _, _ = ops.quantize_rows(x, "row_rms", 4.0)
        assert row_scale.isnan().tolist() == [False, True, False]
        assert not x_int8[1].any() and not x_high[1].any()

    def test_a_step_that_would_be_subnormal_counts_as_zero(self):
        x = torch.full((1, 20), 1e-38)
        assert ops.quantize_rows(x, "none", 0.0).row_scale.item() == 0.0


def linear_arguments(M, K, N, dtype=torch.float32):
    weight_int8, col_scale = reference.quantize_weight(torch.randn(N, K))
    return rows_with_outliers(M, K, dtype), weight_int8, col_scale, torch.randn(N)


class TestInt8Linear:
    @pytest.mark.parametrize("rule, threshold", RULES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_the_specification_bit_for_bit(self, rule, threshold, dtype):
        settings = {"outlier_rule": rule, "outlier_threshold": threshold}
        for M, K, N in SHAPES:
            x, weight_int8, col_scale, bias = linear_arguments(M, K, N, dtype)
            for offset in (None, bias, bias.half()):
                got = ops.int8_linear(x, weight_int8, col_scale, offset, **settings)
                want = reference.int8_linear(x, weight_int8, col_scale, offset, **settings)
                assert got.dtype == dtype and torch.equal(got, want)

    def test_sums_are_exact_integers(self):
        # Rows whose largest element is 127 have a step of 1, so the result is the integer product.
        x = torch.randint(-127, 128, (130, 1000)).float()
        x[:, 0] = 127
        weight = torch.randint(-128, 128, (33, 1000), dtype=torch.int8)
        got = ops.int8_linear(x, weight, torch.ones(33), outlier_rule="none", outlier_threshold=0.0)
        assert torch.equal(got.long(), x.long() @ weight.long().T)

    @pytest.mark.parametrize("rule", ["none", "all"])
    def test_sums_beyond_int32_are_exact(self, rule):
        # Every element at its largest: two planes of K=4096 reach 8.6e9.
        x = torch.full((7, 4096), 3.0)
        weight = torch.full((5, 4096), -127, dtype=torch.int8)
        settings = {"outlier_rule": rule, "outlier_threshold": 0.0}
        got = ops.int8_linear(x, weight, torch.ones(5), **settings)
        assert torch.equal(got, reference.int8_linear(x, weight, torch.ones(5), **settings))
        largest = 16256 if rule == "all" else 127
        total = torch.tensor(-127.0 * largest * 4096, dtype=torch.float64).float()
        assert torch.equal(got, total * (torch.full((7, 5), 3.0) / largest))

    def test_several_blocks_of_rows_with_different_outliers(self):
        x, weight_int8, col_scale, bias = linear_arguments(200, 4096, 21)
        for row in range(0, 200, 3):
            x[row, (row * 37) % 4096] = 50.0
        for rule, threshold in RULES:
            settings = {"outlier_rule": rule, "outlier_threshold": threshold}
            got = ops.int8_linear(x, weight_int8, col_scale, bias, **settings)
            want = reference.int8_linear(x, weight_int8, col_scale, bias, **settings)
            assert torch.equal(got, want), rule

    @pytest.mark.parametrize("num_hot", [1, 16])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_hot_columns(self, num_hot, dtype):
        x, weight_int8, col_scale, bias = linear_arguments(9, 200, 13, dtype)
        hot_columns = torch.randperm(200)[:num_hot].int()
        x[:, hot_columns.long()] *= 50
        hot_weight = torch.randn(13, num_hot)
        settings = {"outlier_rule": "row_rms", "outlier_threshold": 4.0, "hot_columns": hot_columns}
        for weight in (hot_weight, hot_weight.bfloat16(), hot_weight.half()):
            settings["hot_weight"] = weight
            got = ops.int8_linear(x, weight_int8, col_scale, bias, **settings)
            want = reference.int8_linear(x, weight_int8, col_scale, bias, **settings)
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(got, want, rtol=tolerance, atol=100 * tolerance)

    def test_leading_dimensions(self):
        x, weight_int8, col_scale, bias = linear_arguments(6, 40, 5)
        settings = {"outlier_rule": "row_rms", "outlier_threshold": 4.0}
        flat = ops.int8_linear(x, weight_int8, col_scale, bias, **settings)
        shaped = ops.int8_linear(x.view(2, 3, 40), weight_int8, col_scale, bias, **settings)
        single = ops.int8_linear(x[0], weight_int8, col_scale, bias, **settings)
        assert torch.equal(shaped, flat.view(2, 3, 5)) and torch.equal(single, flat[0])

    def test_not_finite_rows(self):
        x, weight_int8, col_scale, bias = linear_arguments(8, 70, 6)
        x[2, 3], x[5, 69] = float("nan"), float("inf")
        got = ops.int8_linear(
            x, weight_int8, col_scale, bias, outlier_rule="absolute", outlier_threshold=6.0
        )
        assert got.isnan().all(dim=1).tolist() == [i in (2, 5) for i in range(8)]
        assert not got[[0, 1, 3, 4, 6, 7]].isnan().any()


class TestLinear:
    @pytest.mark.parametrize("weight_dtype", DTYPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_agrees_with_torch(self, dtype, weight_dtype):
        for M, K, N in SHAPES:
            x, weight, bias = torch.randn(M, K).to(dtype), torch.randn(N, K), torch.randn(N)
            weight = weight.to(weight_dtype)
            for offset in (None, bias):
                got = ops.linear(x, weight, offset)
                want = functional.linear(
                    x.double(), weight.double(), None if offset is None else offset.double()
                )
                assert got.dtype == dtype
                torch.testing.assert_close(
                    got.double(), want, rtol=TOLERANCE[dtype], atol=K**0.5 * TOLERANCE[dtype]
                )

    @pytest.mark.parametrize("N, K", [(1000, 576), (50, 64), (16, 32)])
    def test_16_bit_weights_have_the_accuracy_of_fp32(self, N, K):
        """Of any number of rows, which are the same bits in any company."""
        x = torch.randn(40, K) * torch.randn(40, 1).exp()
        weight = torch.randn(N, K).bfloat16()
        got = ops.linear(x, weight)
        exact = x.double() @ weight.double().T
        error = (got - exact).abs().amax(1)
        assert torch.all(error <= 4 * (x @ weight.float().T - exact).abs().amax(1) + 1e-7)
        for first, count in ((0, 1), (3, 5), (7, 16), (0, 17), (5, 33)):
            rows = slice(first, first + count)
            assert torch.equal(ops.linear(x[rows], weight), got[rows])

    def test_leading_dimensions(self):
        x, weight = torch.randn(2, 3, 20), torch.randn(4, 20)
        assert torch.equal(ops.linear(x, weight).view(6, 4), ops.linear(x.view(6, 20), weight))


class TestAddNorm:
    @pytest.mark.parametrize("kind", ["rms", "layer"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_agrees_with_torch(self, kind, dtype):
        for T, K in [(1, 8), (5, 100), (37, 576), (3, 33)]:
            x, residual = torch.randn(T, K).to(dtype), torch.randn(T, K).to(dtype)
            weight, bias = torch.randn(K).to(dtype), torch.randn(K).to(dtype)
            normed, total = ops.add_norm(x, residual, weight, bias, 1e-5, kind)
            assert torch.equal(total, x + residual)
            if kind == "rms":
                want = functional.rms_norm(total.double(), (K,), weight.double(), 1e-5) + bias
            else:
                want = functional.layer_norm(
                    total.double(), (K,), weight.double(), bias.double(), 1e-5
                )
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(normed.double(), want, rtol=tolerance, atol=tolerance)
            alone, same = ops.add_norm(total, None, weight, bias, 1e-5, kind)
            assert torch.equal(alone, normed) and torch.equal(same, total)

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="kind must be 'rms' or 'layer', got 'batch'"):
            ops.add_norm(torch.randn(1, 4), None, torch.ones(4), None, 1e-5, "batch")


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_agrees_with_torch(dtype):
    gate_up = (torch.randn(7, 74) * 20).to(dtype)
    gate_up[0, 0], gate_up[0, 1], gate_up[0, 2] = -200.0, 200.0, float("nan")
    gate, up = gate_up.double().chunk(2, dim=1)
    want = functional.silu(gate) * up
    got = ops.silu_mul(gate_up).double()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-6, equal_nan=True)


class TestFusedWithQuantizeRows:
    """On CPU a fused op is its two halves, bit for bit; so is it without a library."""

    HOT = (None, torch.tensor([5, 0], dtype=torch.int32))

    @pytest.mark.parametrize("rule, threshold", RULES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_add_norm_quantize(self, rule, threshold, dtype):
        x, residual = rows_with_outliers(7, 133, dtype), torch.randn(7, 133).to(dtype)
        for kind, bias in (("rms", None), ("layer", torch.randn(133))):
            for added in (residual, None):
                for hot in self.HOT:
                    norm = (x, added, torch.randn(133), bias, 1e-5, kind)
                    rows, total = ops.add_norm_quantize(*norm, rule, threshold, hot)
                    normed, want_total = ops.add_norm(*norm)
                    assert torch.equal(total, want_total) and total.dtype == dtype
                    assert_same_rows(rows, ops.quantize_rows(normed, rule, threshold, hot))

    @pytest.mark.parametrize("rule, threshold", RULES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_silu_mul_quantize(self, rule, threshold, dtype):
        gate_up = rows_with_outliers(7, 2 * 133, dtype)
        for hot in self.HOT:
            rows = ops.silu_mul_quantize(gate_up, rule, threshold, hot)
            want = ops.quantize_rows(ops.silu_mul(gate_up), rule, threshold, hot)
            assert_same_rows(rows, want)

    @pytest.mark.parametrize("name", ACTIVATIONS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_activation_quantize(self, name, dtype):
        x = rows_with_outliers(7, 133, dtype)
        for rule, threshold in RULES:
            for hot in self.HOT:
                rows = ops.activation_quantize(x, name, rule, threshold, hot)
                want = ops.quantize_rows(ACTIVATIONS[name](x), rule, threshold, hot)
                assert_same_rows(rows, want)

    def test_without_a_library(self, monkeypatch):
        x, weight = torch.randn(3, 40), torch.randn(40)
        for name in ("add_norm", "quantize_rows", "silu_mul"):
            for op in (f"_{name}", f"_{name}_quantize"):
                if hasattr(rows_module, op):
                    monkeypatch.setattr(rows_module, op, None)
        monkeypatch.setattr(rows_module, "_activation_quantize", None)
        rule = ("row_rms", 4.0)
        rows, total = ops.add_norm_quantize(x, x, weight, None, 1e-5, "rms", *rule)
        normed = plain.norm(x + x, weight, None, 1e-5, "rms")
        assert torch.equal(total, x + x)
        assert_same_rows(rows, reference.quantize_rows(normed, *rule))
        want = reference.quantize_rows(plain.silu_mul(x), *rule)
        assert_same_rows(ops.silu_mul_quantize(x, *rule), want)
        want = reference.quantize_rows(x.relu(), *rule)
        assert_same_rows(ops.activation_quantize(x, "relu", *rule), want)

    def test_bad_arguments(self):
        x, rule = torch.ones(2, 40), ("none", 0.0)
        with pytest.raises(ValueError, match="add_norm_quantize: kind must be 'rms' or 'layer'"):
            ops.add_norm_quantize(x, None, torch.ones(40), None, 1e-5, "batch", *rule)
        with pytest.raises(ValueError, match=r"add_norm_quantize: weight must be \[K=40\], got"):
            ops.add_norm_quantize(x, None, torch.ones(39), None, 1e-5, "rms", *rule)
        with pytest.raises(ValueError, match="activation must be one of relu, gelu, gelu_tanh, bl"):
            ops.activation_quantize(x, "silu", *rule)
        with pytest.raises(ValueError, match="silu_mul_quantize: gate_up must be"):
            ops.silu_mul_quantize(torch.ones(2, 39), *rule)
        hot = torch.tensor([20], dtype=torch.int32)
        with pytest.raises(ValueError, match=r"hot_columns must be in 0\.\.K-1=19, got 20"):
            ops.silu_mul_quantize(x, *rule, hot)
        with pytest.raises(ValueError, match="outlier_rule must be one of"):
            ops.silu_mul_quantize(x, "most", 6.0)


# num_heads, num_kv_heads, head_dim, max_tokens, rotary dims, alibi, window
ATTENTIONS = [
    (9, 3, 64, 100, 64, False, 0),
    (4, 4, 16, 50, 8, False, 0),
    (8, 2, 20, 37, 0, True, 0),
    (3, 1, 80, 77, 32, False, 7),
    (1, 1, 8, 33, 0, False, 1),
    (6, 2, 128, 300, 128, True, 40),
    (14, 2, 5, 129, 4, True, 16),
]


class Case:
    """One attention layer with its tables, and caches of three slots full of NaN."""

    def __init__(self, num_heads, num_kv_heads, head_dim, max_tokens, rotary, alibi, window):
        self.max_tokens, self.head_dim = max_tokens, head_dim
        self.width = (num_heads + 2 * num_kv_heads) * head_dim
        angles = torch.rand(max_tokens, rotary // 2) * 6
        self.settings = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "scale": head_dim**-0.5,
            "cos": angles.cos() if rotary else None,
            "sin": angles.sin() if rotary else None,
            "alibi_slopes": torch.rand(num_heads) if alibi else None,
            "window": window,
        }
        self.key_cache, self.value_cache = self.empty_caches()

    def empty_caches(self):
        slots = (3, self.settings["num_kv_heads"])
        keys = torch.full((*slots, self.head_dim, self.max_tokens), torch.nan)
        return keys, torch.full((*slots, self.max_tokens, self.head_dim), torch.nan)

    def run(self, qkv, segments, caches=None):
        keys, values = caches or (self.key_cache, self.value_cache)
        segments = torch.tensor(segments, dtype=torch.int32)
        return ops.attention(qkv, keys, values, segments, AttentionArgs(**self.settings))

    def oracle(self, qkv):
        """One whole sequence by transformers' rotary embedding and torch's SDPA."""
        H, KV, D = self.settings["num_heads"], self.settings["num_kv_heads"], self.head_dim
        T = len(qkv)
        heads = qkv.view(T, H + 2 * KV, D).transpose(0, 1)[None]
        query, key, value = heads.split([H, KV, KV], dim=1)
        if self.settings["cos"] is not None:
            cos, sin = (
                torch.cat([self.settings[name][:T]] * 2, dim=1)[None] for name in ("cos", "sin")
            )
            R = cos.shape[2]
            turned = apply_rotary_pos_emb(query[..., :R], key[..., :R], cos, sin)
            query = torch.cat([turned[0], query[..., R:]], dim=-1)
            key = torch.cat([turned[1], key[..., R:]], dim=-1)
        age = torch.arange(T)[:, None] - torch.arange(T)
        seen = (age >= 0) & (age < (self.settings["window"] or T))
        mask = torch.zeros(T, T).masked_fill(~seen, -torch.inf).expand(H, T, T)
        if self.settings["alibi_slopes"] is not None:
            mask = mask - self.settings["alibi_slopes"][:, None, None] * age
        out = functional.scaled_dot_product_attention(
            query,
            repeat_kv(key, H // KV),
            repeat_kv(value, H // KV),
            attn_mask=mask[None],
            scale=self.settings["scale"],
        )
        return out[0].transpose(0, 1).reshape(T, H * D)


class TestAttention:
    @pytest.mark.parametrize("shape", ATTENTIONS)
    def test_agrees_with_torch_and_transformers(self, shape):
        case = Case(*shape)
        qkv = torch.randn(case.max_tokens, case.width)
        got = case.run(qkv, [[1, 0, case.max_tokens]])
        torch.testing.assert_close(got, case.oracle(qkv), rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("shape", ATTENTIONS)
    def test_chunks_and_neighbours_do_not_change_a_bit(self, shape):
        case = Case(*shape)
        a, b = torch.randn(2, case.max_tokens, case.width)
        last = case.max_tokens - 1
        whole = case.run(a, [[0, 0, last + 1]], case.empty_caches())
        # a in slot 2 in chunks of 11, 1, 9 and the rest, then its last token, beside parts of b.
        caches = case.empty_caches()
        steps = [(0, 11), (11, 12), (12, 21), (21, last), (last, last + 1)]
        parts = []
        for i, (start, end) in enumerate(steps):
            other = b[5 * i : 5 * i + 5]
            mixed = torch.cat([other, a[start:end]]) if i % 2 else torch.cat([a[start:end], other])
            segments = [[2, start, end - start], [0, 5 * i, 5]]
            out = case.run(mixed, segments[::-1] if i % 2 else segments, caches)
            parts.append(out[5:] if i % 2 else out[: end - start])
        assert torch.equal(torch.cat(parts), whole)

    @pytest.mark.parametrize("shape", ATTENTIONS)
    def test_keys_in_groups_do_not_change_a_bit(self, shape):
        case = Case(shape[0], shape[1], shape[2], shape[3] // 16 * 16, *shape[4:])
        qkv = torch.randn(case.max_tokens, case.width)
        caches = case.empty_caches()
        S, KV, D, L = caches[0].shape
        grouped = key_cache_shape(S, KV, D, L, torch.float32, qkv.device)
        assert grouped == (S, KV, L // 16, D, 16)
        others = [torch.full(grouped, torch.nan), torch.full_like(caches[1], torch.nan)]
        for rows, segment in ((qkv[:-3], [1, 0, L - 3]), (qkv[-3:], [1, L - 3, 3])):
            got, want = (case.run(rows, [segment], some) for some in (others, caches))
            assert torch.equal(got, want)
        in_rows = others[0].transpose(2, 3).reshape(S, KV, D, L)
        assert torch.equal(in_rows[1], caches[0][1])

    def test_keys_in_groups_need_the_compiled_op(self):
        case = Case(*ATTENTIONS[0])
        keys = torch.zeros(3, 3, 6, 64, 16, dtype=torch.bfloat16)
        values = torch.zeros(3, 3, 96, 64, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"key_cache must be \[S, KV, D, L\], got \[3, 3, 6"):
            case.run(torch.zeros(2, case.width, dtype=torch.bfloat16), [[0, 0, 2]], (keys, values))

    @pytest.mark.parametrize("shape", ATTENTIONS)
    def test_the_plain_version_agrees(self, shape):
        case = Case(*shape)
        qkv = torch.randn(12, case.width)
        segments = torch.tensor([[2, 0, 7], [0, 3, 5]], dtype=torch.int32)
        caches = [torch.zeros_like(case.key_cache), torch.zeros_like(case.value_cache)]
        copies = [cache.clone() for cache in caches]
        args = AttentionArgs(**case.settings)
        got = ops.attention(qkv, *caches, segments, args)
        want = plain.attention(qkv, *copies, segments, args)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
        for ours, theirs in zip(caches, copies, strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_caches(self, dtype):
        case = Case(*ATTENTIONS[0])
        qkv = torch.randn(10, case.width).to(dtype)
        caches = [cache.to(dtype) for cache in case.empty_caches()]
        got = case.run(qkv, [[0, 0, 10]], caches)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), case.oracle(qkv.float()), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize(
        "segments, message",
        [
            ([[3, 0, 2]], r"segments\[0\] slot must be in 0..2, got 3"),
            ([[-1, 0, 2]], r"slot must be in 0..2, got -1"),
            ([[0, 0, 1], [0, 100, 1]], r"segments\[1\] positions must be in 0..99, got 100..100"),
            ([[0, 99, 2]], r"positions must be in 0..99, got 99..100"),
            ([[0, -1, 2]], r"positions must be in 0..99, got -1..0"),
            ([[0, 0, -1], [0, 0, 3]], r"positions must be"),
            ([[0, 0, 1]], r"segments must cover T=2 tokens of qkv, got 1"),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bad_segments_raise_and_write_nothing(self, segments, message, dtype):
        case = Case(*ATTENTIONS[0])
        caches = [torch.zeros_like(cache, dtype=dtype) for cache in case.empty_caches()]
        with pytest.raises(ValueError, match=message):
            case.run(torch.randn(2, case.width).to(dtype), segments, caches)
        assert not caches[0].any() and not caches[1].any()

    def test_positions_stay_inside_the_rotary_table(self):
        case = Case(*ATTENTIONS[0])
        case.settings["cos"] = case.settings["cos"][:40]
        case.settings["sin"] = case.settings["sin"][:40]
        with pytest.raises(ValueError, match=r"positions must be in 0..39, got 39..40"):
            case.run(torch.randn(2, case.width), [[0, 39, 2]])


def row_ops(M):
    """(name, function of rows, rows [M, ...]) of every op that works row by row."""
    K, N = 577, 83
    weight_int8, col_scale = reference.quantize_weight(torch.randn(N, K))
    x, weight, bias = rows_with_outliers(M, K), torch.randn(N, K), torch.randn(N)
    norm_weight, norm_bias = torch.randn(K), torch.randn(K)

    def int8(rule, threshold):
        return lambda rows: ops.int8_linear(
            rows, weight_int8, col_scale, bias, outlier_rule=rule, outlier_threshold=threshold
        )

    yield "int8_linear absolute", int8("absolute", 6.0), x
    yield "int8_linear row_rms", int8("row_rms", 3.0), x
    yield "linear", lambda rows: ops.linear(rows, weight, bias), x
    yield "linear 16-bit", lambda rows: ops.linear(rows, weight.bfloat16()), x
    for kind in ("rms", "layer"):
        yield (
            f"add_norm {kind}",
            lambda rows, kind=kind: ops.add_norm(rows, rows, norm_weight, norm_bias, 1e-5, kind)[0],
            x,
        )
    yield "silu_mul", ops.silu_mul, torch.randn(M, 2 * 75)


def test_rows_are_batch_invariant():
    for name, op, x in row_ops(37):
        whole = op(x)
        for rows in (slice(0, 1), slice(2, 3), slice(30, 37), slice(5, 14)):
            assert torch.equal(op(x[rows]), whole[rows]), name


def test_threads_do_not_change_a_bit():
    cases = list(row_ops(150))
    attention = Case(9, 3, 64, 300, 64, False, 0)
    qkv = torch.randn(300, attention.width)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append([op(x) for _, op, x in cases])
            results[-1].append(attention.run(qkv, [[0, 0, 300]], attention.empty_caches()))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@cache  # which keeps the tensors whose addresses prepared blocks have
def compiled_calls():
    """Every compiled op with arguments that it takes, by name."""
    x, weight_int8, col_scale, bias = linear_arguments(5, 40, 6)
    hot = (torch.tensor([1, 9], dtype=torch.int32), torch.randn(6, 2))
    case = Case(4, 2, 16, 24, 8, True, 5)
    caches = [torch.zeros_like(case.key_cache), torch.zeros_like(case.value_cache)]
    segments = torch.tensor([[0, 2, 3], [1, 0, 4]], dtype=torch.int32)
    attention = [torch.randn(7, case.width), *caches, segments, *case.settings.values()]
    scales = [cache.new_zeros(3, 2, 24) for cache in caches]
    int8_caches = [
        part for cache, scale in zip(caches, scales, strict=True) for part in (cache.char(), scale)
    ]
    with_scales = (attention[0], caches[0], None, caches[1], None)
    hidden, heads, inner = 40, 4 * 16, 24
    none = torch.empty(0, dtype=torch.bool)
    linears = []
    for rows, columns in (
        (case.width, hidden),
        (hidden, heads),
        (2 * inner, hidden),
        (hidden, inner),
    ):
        linears += [*linear_arguments(1, columns, rows)[1:3], *[none] * 3]
    sampled = (torch.zeros(2, 7), torch.tensor([0, 2]).int(), torch.tensor([1, 3]).int())
    sampled += (torch.ones(3, 8, dtype=torch.float64),)
    calls = {
        "quantize_rows": (x, 2, 4.0, hot[0]),
        "int8_linear": (x, weight_int8, col_scale, bias, 2, 4.0, *hot),
        "int8_matmul": (
            *reference.quantize_rows(x, "row_rms", 4.0, hot[0]),
            weight_int8,
            col_scale,
            bias,
            hot[1],
            torch.randn(5, 6),
        ),
        "int8_weight_linear": (x, weight_int8, col_scale, bias, torch.randn(5, 6)),
        "linear": (x, torch.randn(6, 40), bias),
        "add_norm": (x, x.clone(), torch.ones(40), torch.ones(40), 1e-5, 1),
        "norm": (x, torch.ones(40), None, 1e-5, 0),
        "silu_mul": (x,),
        "add_norm_quantize": (x, x.clone(), torch.ones(40), None, 1e-5, 0, 2, 4.0, hot[0]),
        "silu_mul_quantize": (x, 2, 4.0, hot[0]),
        "activation_quantize": (x, 3, 1, 6.0, None),
        "attention": tuple(attention),
        "attention_quantize": (*with_scales, *attention[3:], 2, 4.0, hot[0]),
        "place_tokens": (*with_scales, torch.zeros(7, 3).int(), *attention[4:]),
        "int8_kv_attention": (attention[0], *int8_caches, *attention[3:]),
        "prepare_blocks": (
            torch.randn(7, hidden),
            hidden,
            [torch.ones(hidden), none] * 2,
            linears,
            caches,
            False,
            *case.settings.values(),
            1e-5,
            0,
            2,
            4.0,
        ),
        "sample_tokens": (*sampled, torch.zeros(3, dtype=torch.int64)),
        "penalize_logits": (*sampled, torch.zeros(3, 4, dtype=torch.int32)),
        "transform_layout": (weight_int8, 0, 3, 6, 40),
    }
    prepared = torch.ops.dist_int8.prepare_blocks(*calls["prepare_blocks"])
    calls["decoder_blocks"] = (torch.randn(7, hidden), None, segments, prepared)
    return calls


def test_every_op_is_checked():
    assert set(compiled_calls()) == set(OPS)


@pytest.mark.parametrize("name", sorted(compiled_calls()))
def test_opcheck(name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "prepare_blocks":  # its result has addresses in it, which are others in each call
        checks.append("test_aot_dispatch_dynamic")
    op = getattr(torch.ops.dist_int8, name).default
    torch.library.opcheck(op, compiled_calls()[name], test_utils=checks)


def test_compiles_without_graph_breaks():
    x, weight_int8, col_scale, bias = linear_arguments(5, 64, 160)
    case = Case(4, 2, 16, 24, 8, False, 0)
    segments = torch.tensor([[0, 0, 5]], dtype=torch.int32)
    project = torch.randn(case.width, 80)
    rule = ("row_rms", 4.0)

    def fused(x):
        rows, total = ops.add_norm_quantize(x, x, torch.ones(64), None, 1e-5, "rms", *rule)
        gated = ops.silu_mul_quantize(total, *rule)
        activated = ops.activation_quantize(x, "bloom_gelu", *rule)
        return total, *rows, *gated, *activated, *ops.quantize_rows(x, *rule)

    def block(x, key_cache, value_cache):
        normed, total = ops.add_norm(x, x, torch.ones(64), None, 1e-5, "rms")
        wide = ops.int8_linear(
            normed, weight_int8, col_scale, bias, outlier_rule="row_rms", outlier_threshold=4.0
        )
        qkv = ops.linear(ops.silu_mul(wide), project)
        args = AttentionArgs(**case.settings)
        return total + ops.attention(qkv, key_cache, value_cache, segments, args)

    caches, others = case.empty_caches(), case.empty_caches()
    eager = block(x, *caches)
    compiled = torch.compile(block, fullgraph=True, backend="eager")(x, *others)
    assert eager.isfinite().all() and torch.equal(eager, compiled)
    assert torch.equal(caches[0].nan_to_num(), others[0].nan_to_num())
    compiled = torch.compile(fused, fullgraph=True, backend="eager")(x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(compiled, fused(x), strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(2, 39)}, r"weight_int8 must be \[N, K=39\], got \[6, 40\]"),
        ({"x": torch.randn(2, 40).double()}, "x must be float32, bfloat16 or float16, got float64"),
        ({"weight_int8": torch.randn(6, 40)}, "weight_int8 must be int8, got float32"),
        ({"weight_int8": torch.zeros(40, 6, dtype=torch.int8).T}, "must be contiguous"),
        ({"col_scale": torch.ones(5)}, r"col_scale must be \[N=6\], got \[5\]"),
        ({"col_scale": torch.ones(6).half()}, "col_scale must be float32, got float16"),
        ({"bias": torch.ones(7)}, r"bias must be \[N=6\], got \[7\]"),
        ({"outlier_rule": "huge"}, "outlier_rule must be one of none, absolute, row_rms, all"),
        ({"outlier_threshold": -1.0}, "outlier_threshold must be a finite number >= 0"),
        ({"outlier_threshold": float("nan")}, "outlier_threshold must be a finite number >= 0"),
        ({"hot_columns": torch.zeros(1, dtype=torch.int32)}, "must be given together"),
        (
            {"hot_columns": torch.tensor([40], dtype=torch.int32), "hot_weight": torch.ones(6, 1)},
            r"hot_columns must be in 0..K-1=39, got 40",
        ),
        (
            {"x": torch.zeros(1, 131136), "weight_int8": torch.zeros(6, 131136, dtype=torch.int8)},
            "K must be at most 131072, got 131136",
        ),
    ],
)
def test_bad_arguments_of_int8_linear(change, message):
    arguments = {
        "x": torch.randn(2, 40),
        "weight_int8": torch.zeros(6, 40, dtype=torch.int8),
        "col_scale": torch.ones(6),
        "outlier_rule": "absolute",
        "outlier_threshold": 6.0,
    }
    with pytest.raises(ValueError, match=f"^int8.*{message}"):
        ops.int8_linear(**(arguments | change))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 5)),
            r"linear: weight must be \[N, K=3",
        ),
        (
            lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3).int()),
            "linear: weight must be float",
        ),
        (
            lambda: ops.add_norm(
                torch.ones(2, 3), torch.ones(2, 4), torch.ones(3), None, 1e-5, "rms"
            ),
            r"add_norm: residual must be \[T=2, K=3\], got \[2, 4\]",
        ),
        (
            lambda: ops.add_norm(torch.ones(2, 3), None, torch.ones(4), None, 1e-5, "rms"),
            r"^norm: weight must be \[K=3\], got \[4\]",
        ),
        (lambda: ops.silu_mul(torch.ones(2, 3)), r"silu_mul: gate_up must be \[T, 2\*I\], got"),
    ],
)
def test_bad_arguments_of_other_ops(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("instruction_set", ["avx512_vnni", "avx2", "generic"])
def test_other_instruction_sets(instruction_set):
    """This file again, with the kernels of other instruction sets."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "not instruction_sets and not opcheck and not compiles and not bad_arguments"]
    environment = os.environ | {"DIST_INT8_CPU_ISA": instruction_set}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
