"""The index maps of the layouts, exhaustively, and the CUDA kernel's body against them."""

import subprocess

import numpy
import pytest
import torch

from dist_int8.int8.layouts import LAYOUTS, stored_offsets, stored_shape


@pytest.fixture(scope="module")
def program(compile_program):
    return compile_program("transform_layout", sanitize=True)


def test_offsets_and_elements_invert_each_other(program):
    done = subprocess.run([program, "maps"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", range(4))
@pytest.mark.parametrize("target", range(4))
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (33, 130), (40, 128), (65, 36), (7, 259)])
def test_the_kernel_equals_the_index_maps(program, source, target, rows, cols):
    generator = torch.Generator().manual_seed(rows * cols)
    x = torch.randint(-127, 128, (rows, cols), generator=generator, dtype=torch.int8)

    def stored(layout, padding):
        out = torch.full(stored_shape(LAYOUTS[layout], rows, cols), padding, dtype=torch.int8)
        out.view(-1)[stored_offsets(LAYOUTS[layout], rows, cols)] = x
        return out.numpy()

    done = subprocess.run(
        [program, str(source), str(target), str(rows), str(cols)],
        input=stored(source, 99).tobytes(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    got = numpy.frombuffer(done.stdout, numpy.int8)
    assert numpy.array_equal(got, stored(target, 0).ravel())
