"""What the tests of a GPU share.

`DIST_INT8_GPU_TESTS=cpu python -m pytest tests/gpu` runs what does not need a GPU on the CPU: it
shows that the tests themselves work, and nothing about a GPU.
"""

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("DIST_INT8_GPU_TESTS", "cuda"))


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(scope="session")
def stage_device():
    """The device as `load()` names it."""
    return "cuda:0" if DEVICE.type == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Blocks of all sizes full of bits that are NaN in every format go back to the allocator.

    The next results are made in them, so an element that a kernel does not write is seen.
    """
    if DEVICE.type == "cuda":
        sizes = [1 << bits for bits in range(9, 27) for _ in range(4)]
        blocks = [torch.full((s,), 255, dtype=torch.uint8, device=DEVICE) for s in sizes]
        del blocks
    yield


@pytest.fixture
def gpu_only():
    if DEVICE.type != "cuda":
        pytest.skip("only a GPU shows this")


@pytest.fixture(scope="session")
def rows_with_outliers():
    """rows_with_outliers(M, K, dtype, seed=0) -> x [M, K] on the CPU.

    With large columns, a small row and, where there are two, a last row of zeros.
    """

    def make(M, K, dtype, seed=0):
        generator = torch.Generator().manual_seed(M * 131071 + K + seed)
        x = torch.randn(M, K, generator=generator)
        x[:, ::97] *= 40
        x[M // 2] *= 1e-3
        if M > 1:
            x[-1] = 0
        return x.to(dtype)

    return make
