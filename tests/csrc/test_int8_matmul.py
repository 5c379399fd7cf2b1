"""The int8 matrix products for CUDA, run on the host: bit for bit what the specification says."""

import struct
import subprocess
from dataclasses import dataclass, field

import pytest
import torch

from dist_int8.int8 import reference

KERNELS = ("small", "tiled", "finish")
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
    has_residual: bool = False
    has_high_tiles: bool = True
    offset: int = 0
    gap: int = 0
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
            residual = torch.randn(self.M, self.N + self.gap, generator=g).to(self.type)
        if not self.has_high:
            rows = rows._replace(x_high=rows.x_high[:0], high_tiles=rows.high_tiles[:0])
        tensors = [rows.x_int8, rows.x_high, rows.row_scale, rows.high_tiles, rows.x_hot]
        rows_of_residual = None if residual is None else residual.flatten()[: self.num_out]
        tensors += [weight, col_scale, bias, hot_weight, rows_of_residual]
        self.parts = [tensor for tensor in tensors if tensor is not None]

        y = reference.integer_product(rows.x_int8, rows.x_high, weight).float()
        y = y * (rows.row_scale[:, None] * col_scale)
        if self.num_hot:
            y = y + hot_product(rows.x_hot, hot_weight)
        if bias is not None:
            y = y + bias.float()
        if residual is not None:
            y = y + residual[:, : self.N].float()
        return y.to(self.type)

    @property
    def has_high(self) -> bool:
        """Whether x has a second plane; without, the kernel gets null pointers."""
        return self.has_high_tiles and self.rule != "none"

    @property
    def num_out(self) -> int:
        """Elements from the first to the last of the result, gaps between its rows included."""
        return (self.M - 1) * (self.N + self.gap) + self.N

    def decode(self, output: bytes) -> torch.Tensor:
        """The result [M, N]; the gaps must be as they were."""
        flat = torch.frombuffer(bytearray(output), dtype=self.type)
        whole = torch.cat([flat, flat.new_zeros(self.gap)]).view(self.M, self.N + self.gap)
        gaps = whole[:-1, self.N :].contiguous().view(torch.uint8)
        assert (gaps == 0xA5).all(), "a gap between rows was written to"
        return whole[:, : self.N]

    def encode(self) -> bytes:
        def index(dtype: torch.dtype | None) -> int:
            return -1 if dtype is None else TYPES.index(dtype)

        numbers = [KERNELS.index(self.kernel), self.M, self.N, self.K, self.num_hot]
        numbers += [index(self.type), index(self.bias_type), index(self.hot_type or self.type)]
        numbers += [self.has_residual, self.has_high, self.offset, self.gap]
        numbers += [*self.gpu, *self.order]
        data = [part.contiguous().flatten().view(torch.uint8).numpy() for part in self.parts]
        return struct.pack(f"{len(numbers)}q", *map(int, numbers)) + b"".join(
            part.tobytes() for part in data
        )


def hot_product(x_hot, hot_weight):
    """16 columns per step on tensor cores (exact, then rounded), else one fma after the other."""
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
        size = case.num_out * want.element_size()
        got = case.decode(done.stdout[at : at + size])
        at += size
        same = torch.equal(got, want)
        assert same or torch.allclose(got, want, rtol=0, atol=0, equal_nan=True), (
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


def test_every_number_of_rows(program):
    small = [everything("small", M, 40, 272, i) for i, M in enumerate(range(1, 33))]
    tiled = [everything("tiled", M, 40, 272, i) for i, M in enumerate(range(1, 41))]
    run(program, small + tiled)


@pytest.mark.parametrize("kernel", KERNELS)
def test_edges_of_outputs_and_features(program, kernel):
    """N and K around the sizes of tiles, words of flags, vectors; odd ones and one."""
    sizes = [
        (1, 1),
        (3, 7),
        (15, 16),
        (17, 63),
        (16, 64),
        (33, 65),
        (31, 127),
        (64, 128),
        (65, 129),
    ]
    sizes += [(7, 2047), (9, 2048), (5, 2064), (2, 4112), (129, 100), (130, 1024)]
    cases = [
        everything(kernel, (1, 6, 9, 17, 30)[i % 5], N, K, i) for i, (N, K) in enumerate(sizes)
    ]
    run(program, cases, seed=100)


@pytest.mark.parametrize("M", [33, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("kernel", ["tiled", "finish"])
def test_many_rows(program, kernel, M):
    """All shapes of tiles: those for few blocks, for many, and for little shared memory."""
    gpus = [(1, 163 * 1024), (108, 163 * 1024), T4]
    run(
        program,
        [everything(kernel, M, 136, 208, M + i, gpu=gpu) for i, gpu in enumerate(gpus)],
        seed=M,
    )


@pytest.mark.parametrize("gpu", [A100, T4, (1, 227 * 1024), (1, 99 * 1024), (4, 99 * 1024)])
def test_small_on_other_gpus(program, gpu):
    """More rows per block where there are enough blocks, fewer warps where memory is small."""
    run(program, [everything("small", M, 150, 528, M, gpu=gpu) for M in (1, 8, 9, 16, 17, 32)])


@pytest.mark.parametrize("num_hot", [0, 1, 15, 16, 17, 32])
@pytest.mark.parametrize("kernel", KERNELS)
def test_hot_columns_of_all_types(program, kernel, num_hot):
    cases = [
        Case(kernel, 11, 21, 96, num_hot=num_hot, type=x_type, hot_type=hot_type, bias_type=bias)
        for x_type in TYPES
        for hot_type, bias in zip(TYPES, (None, *TYPES), strict=False)
    ]
    run(program, cases)


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_that_is_not_aligned(program, kernel):
    run(program, [everything(kernel, 5, 20, 160, i, offset=o) for i, o in enumerate((1, 4, 8, 15))])


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_without_outliers_and_without_flags(program, kernel):
    cases = [
        Case(kernel, 9, 24, 256, num_outliers=0, rule="none", bias_type=torch.float32),
        Case(kernel, 9, 24, 256, has_high_tiles=False),
        Case(kernel, 9, 24, 256, scale=0.0, bias_type=torch.bfloat16),
    ]
    run(program, cases)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_of_outputs(program, kernel):
    """Rows of the result may be further apart than they are long."""
    run(program, [everything(kernel, 20, 24, 192, i, gap=gap) for i, gap in enumerate((1, 8, 40))])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_independent_of_the_thread_order(program, kernel, order):
    cases = [Case(kernel, 20, 70, 1344, num_hot=16, has_residual=True, order=order)]
    cases += [Case(kernel, 3, 70, 1344, rule="all", order=order)]
    run(program, cases)


def test_nan_stays_in_its_row(program):
    for kernel in KERNELS:
        case = Case(kernel, 4, 8, 64)
        case.draw(0)
        case.parts[2][1] = float("nan")
        done = subprocess.run([program], input=case.encode(), capture_output=True, check=True)
        got = torch.frombuffer(bytearray(done.stdout), dtype=case.type).view(4, 8)
        assert got.isnan().all(dim=1).tolist() == [False, True, False, False], kernel
        assert got.isnan().sum() == 8


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_sums_are_exact(program, kernel):
    """Rows and weights at both extremes, so that totals need 35 bits; int8 of -128 included."""
    K = 131072 - 16 if kernel == "small" else 65536 - 16
    case = Case(kernel, 4, 6, K, type=torch.float32)
    case.draw(0)
    x_int8, x_high, row_scale, flags, _, weight, col_scale, _ = case.parts
    for m, (low, high) in enumerate([(127, 127), (-128, 127), (-128, -128), (64, -127)]):
        x_int8[m], x_high[m] = low, high
    for n, value in enumerate([127, -128, 1, -1, 0, 100]):
        weight[n] = value
    flags.fill_(-1), row_scale.fill_(1.0), col_scale.fill_(1.0)
    want = reference.integer_product(x_int8, x_high, weight).float()
    done = subprocess.run([program], input=case.encode(), capture_output=True, check=True)
    got = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    assert torch.equal(got.view(4, 6), want)


def test_no_access_outside_of_an_array(compile_program):
    """Under AddressSanitizer, with arrays that end where their last element does."""
    sizes = [(1, 1, 1), (2, 17, 33), (9, 33, 160), (20, 70, 272), (31, 129, 100), (70, 130, 144)]
    cases = [
        everything(kernel, M, N, K, i, offset=i % 2)
        for i, (M, N, K) in enumerate(sizes)
        for kernel in KERNELS
        if kernel != "small" or M <= 32
    ]
    run(compile_program("int8_matmul", sanitize=True), cases)
