"""int8 weights times 16-bit activations for CUDA, run on the host, against float64."""

import struct
import subprocess

import pytest
import torch

TYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = ((0, 0, False), (1, 1, False), (2, 2, False), (2, 3, True))
A100, A10, T4 = (108, 163 * 1024), (80, 99 * 1024), (40, 64 * 1024)


@pytest.fixture(scope="module")
def program(compile_program):
    return compile_program("int8_weight_linear")


def multiply(program, x, weight, col_scale, bias, residual, offset=0, gpu=A100, order=ORDERS[0]):
    """What the kernel computes of x [M, K] and weight int8 [N, K]."""
    M, K, N = *x.shape, len(weight)
    numbers = [M, N, K, TYPES.index(x.dtype), -1 if bias is None else TYPES.index(bias.dtype)]
    numbers += [residual is not None, offset, *gpu, *order]
    data = struct.pack("12q", *map(int, numbers))
    for part in (x, weight, col_scale, bias, residual):
        data += b"" if part is None else part.flatten().view(torch.uint8).numpy().tobytes()
    done = subprocess.run([program], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return torch.frombuffer(bytearray(done.stdout), dtype=x.dtype).view(M, N)


def draw(M, N, K, i):
    g = torch.Generator().manual_seed(i)
    dtype = TYPES[1 + i % 2]
    x = torch.randn(M, K, generator=g)
    x[:, i % K] *= 60
    weight = torch.randint(-128, 128, (N, K), generator=g, dtype=torch.int8)
    bias_type = (None, *TYPES)[i % 4]
    bias = None if bias_type is None else torch.randn(N, generator=g).to(bias_type)
    residual = torch.randn(M, N, generator=g).to(dtype) if i % 3 else None
    return x.to(dtype), weight, torch.rand(N, generator=g) / 100, bias, residual


def check(got, x, weight, col_scale, bias, residual):
    product = x.double() @ weight.double().T * col_scale.double()
    extra = sum(part.double() for part in (bias, residual) if part is not None)
    want = product + extra
    # fp32 sums: far inside half a step of the 16-bit result.
    size = x.double().abs() @ weight.double().abs().T * col_scale + abs(extra)
    step = torch.finfo(x.dtype).eps / 2
    assert ((got.double() - want).abs() <= want.abs() * step + size * 1e-6 + 1e-7).all()


@pytest.mark.parametrize("M", [*range(1, 34), 40])
def test_every_number_of_rows(program, M):
    parts = draw(M, 50, 272, M)
    check(multiply(program, *parts, order=ORDERS[M % 4]), *parts)


@pytest.mark.parametrize("gpu", [A100, A10, T4, (1, 227 * 1024), (1, 99 * 1024)])
@pytest.mark.parametrize("M", [3, 12, 29])
def test_on_other_gpus(program, gpu, M):
    parts = draw(M, 130, 528, M)
    check(multiply(program, *parts, gpu=gpu), *parts)


@pytest.mark.parametrize("i, size", [*enumerate([(1, 1), (15, 7), (17, 65), (33, 129), (5, 999)])])
def test_edges_and_memory_that_is_not_aligned(program, i, size):
    parts = draw(7, *size, i)
    check(multiply(program, *parts, offset=i % 2), *parts)


def test_rows_are_independent_of_neighbours_and_of_the_thread_order(program):
    x, weight, col_scale, bias, residual = draw(32, 70, 1344, 5)
    whole = multiply(program, x, weight, col_scale, bias, residual)
    for M, gpu, order in [(1, A100, 1), (8, (1, 227 * 1024), 2), (16, T4, 3), (24, A10, 0)]:
        rest = None if residual is None else residual[:M]
        part = multiply(program, x[:M], weight, col_scale, bias, rest, gpu=gpu, order=ORDERS[order])
        assert torch.equal(part, whole[:M])


def test_every_weight_is_widened_exactly(program):
    weight = torch.arange(-128, 128, dtype=torch.int8).view(256, 1).expand(256, 16).contiguous()
    for dtype in TYPES[1:]:
        x = torch.zeros(16, 16, dtype=dtype)
        x.fill_diagonal_(1.0)
        got = multiply(program, x, weight, torch.ones(256), None, None)
        assert torch.equal(got, weight[:, 0].to(dtype).expand(16, 256))


def test_no_access_outside_of_an_array(compile_program):
    program = compile_program("int8_weight_linear", sanitize=True)
    for i, (M, N, K) in enumerate([(1, 1, 1), (9, 17, 33), (20, 70, 272), (31, 33, 128)]):
        parts = draw(M, N, K, i)
        check(multiply(program, *parts, offset=i % 2), *parts)
