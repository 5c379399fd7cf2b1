"""linear of every instruction set against float64, whatever this machine has."""

import struct
import subprocess

import pytest
import torch

from tests.csrc.conftest import DEFINES


@pytest.fixture(scope="module", params=DEFINES)
def program(request, compile_for_cpu):
    return compile_for_cpu("cpu_linear", request.param)


def run(program, x, weight, bias):
    """x fp32 [M, K], weight bf16 [N, K], bias fp32 [N] -> fp32 [M, N]."""
    sizes = struct.pack("3i", len(x), *weight.shape)
    raw = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in (x, bias, weight)]
    done = subprocess.run([program], input=sizes + b"".join(raw), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(len(x), len(weight))


# In tiles where N is 16 or more and K a multiple of 32.
@pytest.mark.parametrize("N, K", [(48, 64), (50, 96), (16, 32), (130, 576), (15, 64), (64, 100)])
def test_it_has_the_accuracy_of_fp32_for_any_number_of_rows(program, N, K):
    g = torch.Generator().manual_seed(N * K)
    x = torch.randn(35, K, generator=g) * torch.randn(35, 1, generator=g).exp()
    weight = torch.randn(N, K, generator=g).bfloat16()
    bias = torch.randn(N, generator=g)
    got = run(program, x, weight, bias)
    exact = x.double() @ weight.double().T + bias.double()
    in_fp32 = x @ weight.float().T + bias
    assert torch.all((got - exact).abs().amax(1) <= 4 * (in_fp32 - exact).abs().amax(1) + 1e-7)
    for first, count in ((0, 1), (3, 5), (7, 16), (0, 17)):
        rows = slice(first, first + count)
        assert torch.equal(run(program, x[rows], weight, bias), got[rows])
