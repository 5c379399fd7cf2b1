"""The rotation of input features: against Hadamard matrices, and what it leaves alone."""

import pytest
import torch

from dist_int8 import Int8Linear
from dist_int8.int8 import ops, reference
from dist_int8.int8.rotation import rotate, rotate_weight, rotation_block

RULES = [("none", 0.0), ("row_rms", 4.0), ("absolute", 6.0), ("all", 0.0)]


def hadamard(size):
    """Sylvester's construction, as a matrix."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@pytest.mark.parametrize(
    ("features", "rotation", "block"),
    [
        (576, 64, 64),
        (576, 1024, 64),
        (576, 16, 16),
        (100, 64, 4),
        (7, 64, 1),
        (64, 0, 1),
        (0, 64, 1),
    ],
)
def test_the_block_is_the_largest_power_of_two_that_divides(features, rotation, block):
    assert rotation_block(features, rotation) == block


@pytest.mark.parametrize("rotation", [1, 3, 48, -2, 2048])
def test_a_rotation_that_is_no_power_of_two_is_refused(rotation):
    with pytest.raises(ValueError, match="rotation must be 0 or a power of two from 2 to 1024"):
        rotation_block(64, rotation)
    x = torch.zeros(1, 64)
    with pytest.raises((ValueError, RuntimeError), match="rotation must be 0 or a power of two"):
        ops.quantize_rows(x, "none", 0.0, None, rotation)
    with pytest.raises(ValueError, match="rotation must be 0 or a power of two"):
        Int8Linear(64, 8, rotation=rotation)


@pytest.mark.parametrize("size", [2, 16, 64, 1024])
def test_rotate_multiplies_every_block_by_the_hadamard_matrix(size):
    x = torch.randn(3, 3 * size)
    expected = (x.double().unflatten(1, (3, size)) @ hadamard(size)).flatten(1)
    torch.testing.assert_close(rotate(x, size).double(), expected, rtol=1e-5, atol=1e-4)
    weight = torch.randn(5, 3 * size)
    torch.testing.assert_close(rotate(rotate_weight(weight, size), size), weight)
    torch.testing.assert_close(
        rotate(x, size).double() @ rotate_weight(weight, size).double().T,
        x.double() @ weight.double().T,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("rule", RULES, ids=[rule for rule, _ in RULES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [1, 20, 64, 576, 1536])
def test_the_op_equals_the_specification_bit_for_bit(rule, dtype, features):
    x = torch.randn(6, features) * torch.tensor([1.0, 1e-3, 100.0, 1.0, 0.0, 1.0])[:, None]
    x[3, 0] = float("nan")
    x[5, features // 2] = 60000.0
    x = x.to(dtype)
    hot_columns = torch.randperm(features)[: min(features // 2, 16)].int()
    for rotation in (2, 16, 64, 1024):
        got = ops.quantize_rows(x, *rule, hot_columns, rotation)
        expected = reference.quantize_rows(x, *rule, hot_columns, rotation)
        for name, field in zip(got._fields, got, strict=True):
            torch.testing.assert_close(
                field, getattr(expected, name), rtol=0, atol=0, equal_nan=True, msg=name
            )


def test_a_row_whose_rotation_leaves_fp32_is_nan_and_alone():
    x = torch.ones(3, 64)
    x[1] = 3e38
    for quantize in (ops.quantize_rows, reference.quantize_rows):
        rows = quantize(x, "none", 0.0, None, 64)
        assert rows.row_scale[1].isnan()
        assert (rows.x_int8[1] == 0).all()
        assert rows.row_scale[[0, 2]].isfinite().all()


def test_a_large_element_no_longer_sets_the_step_of_its_row():
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 64, bias=False)
    x = torch.randn(32, 512)
    x[:, 100] *= 30.0
    expected = linear(x)
    errors = [
        (Int8Linear.from_linear(linear, 0.0, "none", rotation=rotation)(x) - expected).norm()
        for rotation in (0, 64)
    ]
    assert errors[1] < errors[0] / 2


def test_a_layer_gives_its_weight_back_rotated_back():
    torch.manual_seed(0)
    linear = torch.nn.Linear(192, 32)
    layer = Int8Linear.from_linear(linear, 0.0, "none", [3, 70], rotation=64)
    assert torch.equal(layer.weight[:, [3, 70]], linear.weight[:, [3, 70]])
    difference = (layer.weight - linear.weight).detach()
    # an error of up to col_scale / 2 in each of 64 rotated features, rotated back
    assert (difference.norm(dim=1) <= 64**0.5 * 192**0.5 * layer.col_scale / 2).all()
    x = torch.randn(4, 192, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 32) @ layer.weight)


@pytest.mark.parametrize(
    ("activation_group", "weight_group"), [(64, 0), (0, 64), (64, 128), (128, 64)]
)
def test_groups_have_scales_of_their_own(activation_group, weight_group):
    """Against the dequantized operands in fp64."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 320), torch.randn(7, 320)
    x[:, 64:128] *= 20
    weight_int8, col_scale = reference.quantize_weight(rotate_weight(weight, 64), weight_group)
    groups = {"activation_group": activation_group, "weight_group": weight_group}
    y = reference.int8_linear(
        x, weight_int8, col_scale, outlier_rule="none", outlier_threshold=0.0, rotation=64, **groups
    )
    rows = reference.quantize_rows(x, "none", 0.0, None, 64, activation_group)
    scale = reference.spread(rows.row_scale, 320, activation_group)
    x_again = rows.x_int8.double() * scale.double()
    w_again = weight_int8.double() * reference.spread(col_scale, 320, weight_group).double()
    torch.testing.assert_close(y.double(), x_again @ w_again.T, rtol=1e-5, atol=1e-4)
    exact = x.double() @ weight.double().T
    assert (y - exact).norm() < 0.02 * exact.norm()
