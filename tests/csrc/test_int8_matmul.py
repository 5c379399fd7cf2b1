"""The int8 matrix products for CUDA, run on the host: bit for bit what the specification says."""

import struct
import subprocess
from dataclasses import dataclass, field

import pytest
import torch

from dist_int8.int8 import reference

KERNELS = ("small", "tiled", "outlier_part")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
A100 = (108, 163 * 1024)  # multiprocessors, bytes of shared memory that a block can have
T4 = (40, 64 * 1024)
ORDERS = (  # order of threads, seed, copies may arrive early
    (0, 0, False),
    (1, 1, False),
    (2, 2, False),
    (2, 3, True),
)


@dataclass
class Case:
    kernel: str
    M: int
    N: int
    K: int
    rule: str = "absolute"
    threshold: float = 6.0
    num_hot: int = 0
    type: torch.dtype = torch.bfloat16
    bias_type: torch.dtype | None = None
    hot_type: torch.dtype | None = None
    out_type: torch.dtype | None = None
    has_residual: bool = False
    has_high_tiles: bool = True
    offset: int = 0
    gpu: tuple[int, int] = A100
    order: tuple[int, int, bool] = ORDERS[0]
    scale: float = 1.0
    num_outliers: int = 3
    parts: list[torch.Tensor] = field(default_factory=list)

    def draw(self, seed: int) -> torch.Tensor:
        """Fills `parts` with what the kernel reads and returns what it must compute."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.M, self.K, generator=g) * self.scale
        for m in range(self.M):
            columns = torch.randint(0, self.K, (self.num_outliers,), generator=g)
            x[m, columns] *= 20
        x = x.to(self.type)
        hot = torch.randperm(self.K, generator=g)[: self.num_hot].to(torch.int32)
        rows = reference.quantize_rows(x, self.rule, self.threshold, hot if self.num_hot else None)
        weight, col_scale = reference.quantize_weight(torch.randn(self.N, self.K, generator=g))
        hot_type = self.hot_type or self.type
        hot_weight = torch.randn(self.N, self.num_hot, generator=g).to(hot_type)
        bias = None
        if self.bias_type is not None:
            bias = torch.randn(self.N, generator=g).to(self.bias_type)
        residual = None
        if self.has_residual:
            residual = torch.randn(self.M, self.N, generator=g).to(self.type)
        tensors = [rows.x_int8, rows.x_high, rows.row_scale, rows.high_tiles, rows.x_hot]
        tensors += [weight, col_scale, bias, hot_weight, residual]
        self.parts = [tensor for tensor in tensors if tensor is not None]

        low, high = rows.x_int8, rows.x_high
        if self.kernel == "outlier_part":
            low = torch.zeros_like(low)
        if not self.has_high_tiles:
            high = torch.zeros_like(high)
        y = reference.integer_product(low, high, weight).float()
        y = y * (rows.row_scale[:, None] * col_scale)
        if self.num_hot:
            y = y + hot_product(rows.x_hot, hot_weight)
        if bias is not None:
            y = y + bias.float()
        if residual is not None:
            y = y + residual.float()
        return y.to(self.out_type or self.type)

    def encode(self) -> bytes:
        def index(dtype: torch.dtype | None) -> int:
            return -1 if dtype is None else TYPES.index(dtype)

        numbers = [KERNELS.index(self.kernel), self.M, self.N, self.K, self.num_hot]
        numbers += [index(self.type), index(self.bias_type), index(self.hot_type or self.type)]
        numbers += [index(self.out_type or self.type), self.has_residual, self.has_high_tiles]
        numbers += [self.offset, *self.gpu, *self.order]
        data = [part.contiguous().flatten().view(torch.uint8).numpy() for part in self.parts]
        return struct.pack(f"{len(numbers)}q", *map(int, numbers)) + b"".join(
            part.tobytes() for part in data
        )


def hot_product(x_hot, hot_weight):
    """16 columns a step on tensor cores (exact, then rounded), else one fp32 fma after the other."""
    step = 16 if x_hot.dtype == hot_weight.dtype != torch.float32 else 1
    total = torch.zeros(len(x_hot), len(hot_weight))
    for h in range(0, x_hot.shape[1], step):
        columns = slice(h, h + step)
        product = x_hot[:, columns].double() @ hot_weight[:, columns].double().T
        total = (total.double() + product).float()
    return total


def run(program, cases, seed=0):
    """Runs all cases in one process and compares each."""
    wanted = [case.draw(seed + i) for i, case in enumerate(cases)]
    data = b"".join(case.encode() for case in cases)
    done = subprocess.run([program], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    at = 0
    for case, want in zip(cases, wanted, strict=True):
        size = want.numel() * want.element_size()
        got = torch.frombuffer(bytearray(done.stdout[at : at + size]), dtype=want.dtype)
        at += size
        same = torch.equal(got.view(want.shape), want)
        assert same or torch.allclose(got.view(want.shape), want, rtol=0, atol=0, equal_nan=True), (
            f"{case.kernel} M={case.M} N={case.N} K={case.K} {case.rule} {case.order}"
        )
    assert at == len(done.stdout)


@pytest.fixture(scope="module")
def program(compile_program):
    return compile_program("int8_matmul")


def everything(kernel: str, M: int, N: int, K: int, i: int, **options) -> Case:
    """A case with the i-th mixture of types, rule, hot columns, bias and residual."""
    rule = ("absolute", "row_rms", "all", "none")[i % 4]
    given = {
        "rule": rule,
        "num_hot": min((0, 16, 32, 5)[i // 2 % 4], K),
        "type": TYPES[i % 3],
        "bias_type": (None, *TYPES)[i // 3 % 4],
        "hot_type": (None, *TYPES)[i // 5 % 4],
        "has_residual": i % 5 < 2,
        "order": ORDERS[i % len(ORDERS)],
    }
    return Case(kernel, M, N, K, **(given | options))


def test_small_every_number_of_rows(program):
    cases = [everything("small", M, 40, 272, i) for i, M in enumerate(range(1, 33))]
    run(program, cases)
