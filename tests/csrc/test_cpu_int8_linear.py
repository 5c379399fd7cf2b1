"""int8_linear of every instruction set against the specification, whatever this machine has."""

import struct
import subprocess
from dataclasses import dataclass

import pytest
import torch

from dist_int8.int8 import checks, packing, reference
from dist_int8.int8.rotation import rotate_weight
from tests.csrc.conftest import DEFINES


@pytest.fixture(scope="module", params=DEFINES)
def program(request, compile_for_cpu):
    return compile_for_cpu("cpu_int8_linear", request.param)


@dataclass
class Case:
    M: int
    N: int
    K: int
    rule: str = "none"
    threshold: float = 0.0
    num_hot: int = 0
    rotation: int = 0
    has_bias: bool = False
    packed: bool = False

    def __post_init__(self):
        g = torch.Generator().manual_seed(self.M * self.N + self.K)
        self.x = torch.randn(self.M, self.K, generator=g)
        self.x[torch.rand(self.x.shape, generator=g) < 0.01] *= 30
        hot = torch.randperm(self.K, generator=g)[: self.num_hot].int()
        self.hot = hot if self.num_hot else None
        weight = torch.randn(self.N, self.K, generator=g)
        self.hot_weight = weight[:, hot.long()].contiguous() if self.num_hot else None
        weight[:, hot.long()] = 0
        rotated = rotate_weight(weight, self.rotation)
        self.weight, self.col_scale = reference.quantize_weight(rotated)
        self.weight[0, :] = -128  # of a foreign checkpoint
        self.bias = torch.randn(self.N, generator=g) if self.has_bias else None

    def expected(self):
        return reference.int8_linear(
            self.x,
            self.weight,
            self.col_scale,
            self.bias,
            outlier_rule=self.rule,
            outlier_threshold=self.threshold,
            hot_columns=self.hot,
            hot_weight=self.hot_weight,
            rotation=self.rotation,
        )

    def encoded(self):
        rule = checks.OUTLIER_RULES.index(self.rule)
        numbers = [self.M, self.N, self.K, self.num_hot, rule, self.rotation]
        numbers += [int(self.packed), int(self.has_bias)]
        weight, hot_weight = self.weight.clone(), self.hot_weight
        if self.packed:
            packing.pack_(weight, packing.GROUP)
            hot_weight = None if hot_weight is None else packing.pack_(hot_weight.clone(), 1)
        arrays = [self.x, weight, self.col_scale, self.bias, self.hot, hot_weight]
        raw = [a.contiguous().view(torch.uint8).numpy().tobytes() for a in arrays if a is not None]
        return struct.pack("8id", *numbers, self.threshold) + b"".join(raw)


def run(program, cases):
    done = subprocess.run(
        [program], input=b"".join(case.encoded() for case in cases), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    values = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    return values.split([case.M * case.N for case in cases])


CASES = [
    Case(1, 16, 4, packed=True),
    Case(1, 64, 64, packed=True, rotation=64),
    Case(7, 80, 192, packed=True, rotation=16, has_bias=True),
    Case(13, 144, 1024, packed=True, rotation=1024),
    Case(9, 176, 256, packed=True, rule="row_rms", threshold=2.0, rotation=32),
    Case(5, 48, 1100, packed=True, rule="all"),
    Case(3, 19, 37, rotation=64, has_bias=True),
    Case(100, 33, 200, rule="absolute", threshold=6.0, rotation=2),
    Case(6, 65, 130, rule="row_rms", threshold=4.0, rotation=64, has_bias=True),
    Case(33, 112, 68, packed=True, rule="row_rms", threshold=2.0),
    Case(300, 48, 64, packed=True, rotation=64),
]


def test_equals_the_specification_bit_for_bit(program):
    for case, y in zip(CASES, run(program, CASES), strict=True):
        assert torch.equal(y.view(case.M, case.N), case.expected()), case


def test_hot_columns_and_packing(program):
    cases = [
        Case(M, N, 96, num_hot=H, rotation=32, packed=packed)
        for M, N, H in [(1, 64, 16), (5, 80, 8), (8, 16, 3)]
        for packed in (False, True)
    ]
    results = run(program, cases)
    for case, y in zip(cases, results, strict=True):
        torch.testing.assert_close(y.view(case.M, case.N), case.expected(), rtol=3e-6, atol=3e-5)
    for row_major, packed in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(row_major, packed)
