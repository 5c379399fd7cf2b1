"""Layout transforms on a GPU: the storage of the CPU, byte for byte."""

import pytest
import torch

from dist_int8.int8.layouts import LAYOUTS, stored_offsets, stored_shape, transform_layout


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (33, 130), (40, 128), (65, 36), (1000, 4097), (0, 8)])
def test_layout_transforms_equal_the_cpu(device, source, target, shape):
    x = torch.randint(-127, 128, shape, dtype=torch.int8)
    stored = torch.full(stored_shape(source, *shape), 99, dtype=torch.int8)
    stored.view(-1)[stored_offsets(source, *shape)] = x
    got = transform_layout(stored.to(device), source, target, shape)
    assert torch.equal(got.cpu(), transform_layout(stored, source, target, shape))
    assert torch.equal(transform_layout(got, target, "row", shape).cpu(), x)


def test_offsets_beyond_32_bits(device, gpu_only):
    """Offsets beyond 32 bits: BLOOM's embedding is 250880 x 14336."""
    rows, cols = 300032, 14336
    if torch.cuda.get_device_properties(device).total_memory < 4 * rows * cols:
        pytest.skip("needs four times the matrix")
    x = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, device=device)
    for layout in LAYOUTS[1:]:
        stored = transform_layout(x, "row", layout)
        assert torch.equal(transform_layout(stored, layout, "row", (rows, cols)), x)
        last_panel = transform_layout(x[:, -32:].cpu().contiguous(), "row", layout)
        assert torch.equal(stored.flatten()[-32 * rows :].cpu(), last_panel.flatten())
