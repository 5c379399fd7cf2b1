"""The CUDA kernels over rows, run in the emulator, against the specification.

Planes, scales, tile flags and hot columns are compared bit for bit.
"""

import struct
import subprocess
from dataclasses import dataclass

import numpy
import pytest
import torch

from dist_int8.int8 import checks, plain, reference
from dist_int8.int8.activations import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROTATIONS = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
RULES = [("none", 0.0), ("absolute", 6.0), ("row_rms", 4.0), ("row_rms", 1.5), ("all", 0.0)]
OPS = ["quantize_rows", "add_norm", "add_norm_quantize", "silu_mul", "silu_mul_quantize"]
OPS += ["activation_quantize"]
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class Case:
    """One launch: an op over rows x, and where and in which order it runs."""

    op: str
    x: torch.Tensor  # [M, K], or [M, 2 * K] of the ops with a gate
    rule: str = "none"
    threshold: float = 0.0
    hot: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    kind: str = "rms"
    eps: float = 1e-5
    activation: str = "relu"
    rotation: int = 0
    shift: int = 0  # elements between a 16-byte boundary and x
    max_shared_bytes: int = 48 * 1024
    order: str = "forward"
    seed: int = 0

    @property
    def size(self):
        num_rows, width = self.x.shape
        return num_rows, width // 2 if self.op.startswith("silu_mul") else width

    def encoded(self):
        M, K = self.size
        num_hot = 0 if self.hot is None else len(self.hot)
        rule = checks.check_outlier_rule(self.rule, self.threshold)
        weight_dtype = torch.float32 if self.weight is None else self.weight.dtype
        numbers = [OPS.index(self.op), DTYPES.index(self.x.dtype), DTYPES.index(weight_dtype)]
        numbers += [checks.OUTLIER_RULES.index(rule), M, K, num_hot]
        numbers += [int(self.kind == "layer"), int(self.residual is not None)]
        numbers += [int(self.bias is not None), list(ACTIVATIONS).index(self.activation)]
        numbers += [self.shift, self.max_shared_bytes, ORDERS[self.order], self.seed]
        numbers += [self.rotation]
        arrays = [self.x, self.residual, self.weight, self.bias, self.hot]
        head = struct.pack("16i2d", *numbers, self.threshold, self.eps)
        return head + b"".join(to_bytes(array) for array in arrays if array is not None)


def to_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def run(program, cases):
    """What the kernels make of each case: {"total", "plain"} and the fields of QuantizedRows."""
    done = subprocess.run(
        [program], input=b"".join(case.encoded() for case in cases), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    at, results = 0, []
    for case in cases:
        (M, K), dtype = case.size, case.x.dtype
        quantizes = case.op.endswith("quantize") or case.op == "quantize_rows"
        shapes = {} if case.residual is None else {"total": ((M, K), dtype)}
        if quantizes:
            rule = checks.check_outlier_rule(case.rule, case.threshold)
            num_high = 0 if rule == "none" else M
            shapes |= {"x_int8": ((M, K), torch.int8), "x_high": ((num_high, K), torch.int8)}
            shapes["row_scale"] = ((M,), torch.float32)
            shapes["high_tiles"] = ((num_high, -(-K // 2048)), torch.int32)
            shapes["x_hot"] = ((M, 0 if case.hot is None else len(case.hot)), dtype)
        else:
            shapes["plain"] = ((M, K), dtype)
        result = {}
        for name, (shape, of) in shapes.items():
            count = int(numpy.prod(shape))
            length = count * of.itemsize
            part = bytearray(done.stdout[at : at + length])
            empty = torch.empty(shape, dtype=of)
            result[name] = torch.frombuffer(part, dtype=of).view(shape) if count else empty
            at += length
        results.append(result)
    assert at == len(done.stdout)
    return results


def assert_quantized(result, x, case):
    """The result is what the specification makes of x, bit for bit."""
    want = reference.quantize_rows(x, case.rule, case.threshold, case.hot, case.rotation)
    for name, theirs in zip(want._fields, want, strict=True):
        ours = result[name]
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        assert same.all(), (name, case.rule, case.rotation, case.x.dtype, list(case.x.shape))


def difficult_rows(M, K, dtype, seed=0):
    """Gaussian rows; in turn also zeros, outliers, NaN, Inf, all alike, tiny and huge elements."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator)
    for row in range(M):
        kind, at = row % 9, (row * 37 + 11) % K
        if kind == 1:
            x[row] = 0
        elif kind == 2:
            x[row, at], x[row, K - 1] = 90.0, -300.0
        elif kind == 3:
            x[row, :: max(1, K // 6)] *= 40
        elif kind == 4:
            x[row, at] = float("nan")
        elif kind == 5:
            x[row, at] = -float("inf")
        elif kind == 6:
            x[row] = 7.0
        elif kind == 7:
            x[row] *= 1e-37 if dtype != torch.float16 else 1e-6
        elif kind == 8:
            x[row] *= 3e37 if dtype != torch.float16 else 1e4
    return x.to(dtype)


def hot_columns(K):
    """None, one, and (out of order) sixteen or as many as there are."""
    some = torch.randperm(K, generator=torch.Generator().manual_seed(K))[:16].int()
    return None, torch.tensor([K - 1], dtype=torch.int32), some


@pytest.fixture(params=[False, True], ids=["plain", "sanitized"])
def program(request, compile_program):
    return compile_program("rows", sanitize=request.param)


@pytest.fixture
def fast_program(compile_program):
    return compile_program("rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows_equals_the_specification(program, dtype):
    cases = []
    for M, K in [(9, 16), (9, 1), (9, 7), (18, 100), (9, 512), (9, 577), (2, 2049), (3, 4096)]:
        x = difficult_rows(M, K, dtype)
        for rule, threshold in RULES:
            for hot in hot_columns(K):
                cases.append(Case("quantize_rows", x, rule, threshold, hot))
    for case, result in zip(cases, run(program, cases), strict=True):
        assert_quantized(result, case.x, case)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotated_rows_equal_the_specification(program, rotation):
    """Blocks in a lane, over lanes, over the two spans of a warp; K that only a part divides."""
    cases = []
    widths = (rotation, 3 * rotation, 24, 40, 96, 100, 352, 577, 1056, 2112, 2048 + rotation)
    for K in sorted(set(widths)):
        for dtype in DTYPES:
            x = difficult_rows(9, K, dtype)
            rule = ("none", 0.0) if len(cases) % 2 else RULES[len(cases) % len(RULES)]
            hot = hot_columns(K)[len(cases) % 3]
            cases.append(Case("quantize_rows", x, *rule, hot, rotation=rotation))
    for case, result in zip(cases, run(program, cases), strict=True):
        assert_quantized(result, case.x, case)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rotation", [16, 64, 512, 1024])
def test_no_order_of_threads_changes_a_bit_of_rotated_rows(program, rotation, order):
    """Rows kept in shared memory, in part (whole blocks), or computed again in every pass."""
    cases = []
    for seed, (dtype, K) in enumerate([(torch.bfloat16, 5120), (torch.float32, 3072)]):
        x = difficult_rows(6, K, dtype)
        hot = hot_columns(K)[2]
        for rule in (("none", 0.0), ("row_rms", 4.0)):
            for max_shared_bytes in (2048, 10000, 48 * 1024):
                place = {"max_shared_bytes": max_shared_bytes, "order": order, "seed": seed}
                case = Case("quantize_rows", x, *rule, hot, rotation=rotation, shift=seed, **place)
                cases.append(case)
    for case, result in zip(cases, run(program, cases), strict=True):
        assert_quantized(result, case.x, case)


def test_a_rotation_that_leaves_fp32_makes_a_nan_row(program):
    """Although every element is finite; its neighbours are as ever."""
    x = torch.randn(3, 256)
    x[1, 64:128] = 2e37  # times 64 is more than fp32 holds
    cases = [Case("quantize_rows", x, rotation=rotation) for rotation in (0, 8, 64, 256)]
    results = run(program, cases)
    for case, result in zip(cases, results, strict=True):
        assert_quantized(result, x, case)
    overflows = [result["row_scale"].isnan().tolist() for result in results]
    assert overflows == [[False] * 3, [False] * 3, [False, True, False], [False, True, False]]


@pytest.mark.parametrize("order", ORDERS)
def test_no_order_of_threads_and_no_alignment_changes_a_bit(program, order):
    """Rows of several warps, kept in shared memory or not, or in part."""
    cases = []
    for seed, (dtype, K) in enumerate([(torch.bfloat16, 2048), (torch.float32, 1111)]):
        x = difficult_rows(9, K, dtype)
        for max_shared_bytes in (640, 2048, 48 * 1024):
            for shift in (0, 1, 3):
                cases.append(
                    Case(
                        "quantize_rows",
                        x,
                        "row_rms",
                        4.0,
                        hot_columns(K)[2],
                        shift=shift,
                        max_shared_bytes=max_shared_bytes,
                        order=order,
                        seed=seed,
                    )
                )
    for case, result in zip(cases, run(program, cases), strict=True):
        assert_quantized(result, case.x, case)


def test_the_widest_rows(fast_program):
    cases = []
    for K, dtype in [(14336, torch.bfloat16), (57344, torch.float16), (131072, torch.float32)]:
        x = difficult_rows(3, K, dtype)
        x[0, K - 1] = x[1, 0] = 100.0
        for rule, threshold in (("row_rms", 4.0), ("all", 0.0)):
            cases.append(Case("quantize_rows", x, rule, threshold, hot_columns(K)[2]))
    for case, result in zip(cases, run(fast_program, cases), strict=True):
        assert_quantized(result, case.x, case)


def test_a_hot_column_that_is_not_there_matches_nothing(program):
    x = torch.randn(2, 40)
    wrong = torch.tensor([-1, 40, 1 << 30, 3], dtype=torch.int32)
    case = Case("quantize_rows", x, "absolute", 6.0, wrong)
    (result,) = run(program, [case])
    want = reference.quantize_rows(x, "absolute", 6.0, wrong[3:])
    assert torch.equal(result["x_int8"], want.x_int8)
    assert torch.equal(result["x_hot"], torch.stack([x[:, 3] * i for i in (0, 0, 0, 1)], dim=1))


def test_quotients_are_those_of_a_division(fast_program):
    """Random mantissas, whole and half quotients and their neighbours, steps of every size."""
    generator = torch.Generator().manual_seed(0)

    def mantissas(count):
        return 1 + torch.rand(count, generator=generator)

    count = 400_000
    exponents = torch.randint(-126, 121, (count,), generator=generator)
    step = torch.ldexp(mantissas(count), exponents)
    whole = torch.randint(-32512, 32513, (count,), generator=generator) / 2
    near = (whole * step).view(torch.int32)
    nudges = torch.randint(-2, 3, (count,), generator=generator).int()
    near = (near + nudges).view(torch.float32)
    anywhere = step * 16256 * (2 * torch.rand(count, generator=generator) - 1)
    for v in (near, anywhere, torch.ldexp(mantissas(count), exponents)):
        inside = v.isfinite() & ((v / step).abs() <= 16300)
        pairs = torch.stack([v[inside], step[inside]], dim=1)
        data = subprocess.run(
            [fast_program, "divide"], input=to_bytes(pairs), capture_output=True
        ).stdout
        got = torch.from_numpy(numpy.frombuffer(data, numpy.float32).copy())
        want = pairs[:, 0] / pairs[:, 1]
        # What rounds to 0 in any case may differ: its remainders are below the subnormal numbers.
        matters = want.abs() > 0.25
        assert torch.equal(got[matters], want[matters]) and (got[~matters].abs() <= 0.26).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_add_norm_and_its_fused_form(program, kind, dtype):
    generator = torch.Generator().manual_seed(1)
    cases = []
    for M, K in [(3, 16), (2, 577), (2, 1024), (3, 33)]:
        # A mean far from zero shows a variance that is not taken about it.
        x = torch.randn(M, K, generator=generator) + 30 * (kind == "layer")
        x[0] *= 20
        added = torch.randn(M, K, generator=generator).to(dtype)
        for weight_dtype in {dtype, torch.float32}:
            weight = torch.randn(K, generator=generator).to(weight_dtype)
            bias = torch.randn(K, generator=generator).to(weight_dtype)
            for residual, offset in ((None, None), (added, bias), (added, None), (None, bias)):
                for max_shared_bytes, shift, order in ((576, 1, "random"), (49152, 0, "reverse")):
                    settings = {
                        "residual": residual,
                        "weight": weight,
                        "bias": offset,
                        "kind": kind,
                        "max_shared_bytes": max_shared_bytes,
                        "shift": shift,
                        "order": order,
                    }
                    cases.append(Case("add_norm", x.to(dtype), **settings))
                    settings["hot"] = hot_columns(K)[2]
                    settings["rotation"] = (0, 64, 1024, 8)[len(cases) // 2 % 4]
                    rule = RULES[len(cases) % len(RULES)]
                    cases.append(Case("add_norm_quantize", x.to(dtype), *rule, **settings))
    results = run(program, cases)
    for i in range(0, len(cases), 2):
        case, unfused, fused = cases[i], results[i], results[i + 1]
        total = case.x if case.residual is None else case.x + case.residual
        if case.residual is not None:
            assert torch.equal(unfused["total"], total) and torch.equal(fused["total"], total)
        want = plain.norm(total, case.weight, case.bias, case.eps, kind).float()
        bound = 4 * TOLERANCE[dtype] if dtype == torch.float32 else TOLERANCE[dtype]
        torch.testing.assert_close(unfused["plain"].float(), want, rtol=bound, atol=bound)
        assert_quantized(fused, unfused["plain"], cases[i + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_and_its_fused_form(program, dtype):
    cases = []
    for M, K in [(3, 16), (2, 577), (2, 1024), (300, 3)]:
        gate_up = torch.randn(M, 2 * K, generator=torch.Generator().manual_seed(K)) * 5
        gate_up[0, 0], gate_up[0, 1], gate_up[1, 0] = -200.0, 200.0, float("nan")
        for max_shared_bytes, shift, order in ((576, 1, "random"), (49152, 0, "reverse")):
            place = {"max_shared_bytes": max_shared_bytes, "shift": shift, "order": order}
            cases.append(Case("silu_mul", gate_up.to(dtype), **place))
            rule = RULES[len(cases) % len(RULES)]
            place["rotation"] = (0, 64, 1024, 8)[len(cases) // 2 % 4]
            hot = hot_columns(K)[1]
            cases.append(Case("silu_mul_quantize", gate_up.to(dtype), *rule, hot, **place))
    results = run(program, cases)
    for i in range(0, len(cases), 2):
        values = results[i]["plain"]
        want = plain.silu_mul(cases[i].x)
        torch.testing.assert_close(values, want, rtol=TOLERANCE[dtype], atol=1e-6, equal_nan=True)
        assert_quantized(results[i + 1], values, cases[i + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_quantize(program, name, dtype):
    x = torch.randn(6, 1088, generator=torch.Generator().manual_seed(2)) * 4
    x[0] = torch.linspace(-12, 12, 1088)
    x[1, 5] = float("nan")
    x = x.to(dtype)
    # x_hot of all columns is the activation itself.
    every = torch.arange(1088, dtype=torch.int32)
    cases = [Case("activation_quantize", x, hot=every, activation=name)]
    for rule in RULES:
        for size in (1024, 49152):
            place = {"max_shared_bytes": size, "order": "random"}
            place["rotation"] = (0, 64, 1024)[len(cases) % 3]
            cases.append(Case("activation_quantize", x, *rule, activation=name, **place))
    first, *results = run(program, cases)
    values = first["x_hot"]
    want = ACTIVATIONS[name](x.float()).to(dtype)
    torch.testing.assert_close(values, want, rtol=TOLERANCE[dtype], atol=2e-6, equal_nan=True)
    for case, result in zip(cases[1:], results, strict=True):
        assert_quantized(result, values, case)
