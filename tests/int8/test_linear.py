"""`Int8Linear` against torch's float64 products, and across state dicts, devices and casts."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from dist_int8.int8.linear import Int8Linear

RULES = [("none", 0.0), ("absolute", 6.0), ("row_rms", 4.0), ("all", 0.0)]
HOT = [3, 17, 40, 41]


def a_linear(K: int = 96, N: int = 56, bias: bool = True, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False)


def rows(num_rows: int = 7, K: int = 96, dtype=torch.float32) -> torch.Tensor:
    """Gaussian rows with a few features 30 times larger."""
    x = torch.randn(num_rows, K, generator=torch.Generator().manual_seed(1))
    x[:, HOT] *= 30
    return x.to(dtype)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_near_the_float64_product(dtype, bias):
    linear, x = a_linear(bias=bias, dtype=dtype), rows(dtype=dtype)
    layer = Int8Linear.from_linear(linear)
    y = layer(x)
    exact = nn.functional.linear(
        x.double(), linear.weight.double(), linear.bias.double() if bias else None
    )
    assert y.dtype == dtype and y.shape == (7, 56)
    assert relative_error(y, exact) < 0.015
    # With the weights' own rounding taken away, what is left is the rounding of x.
    of_dequantized = nn.functional.linear(
        x.double(), layer.dequantize().double(), linear.bias.double() if bias else None
    )
    all_planes = Int8Linear.from_linear(linear, outlier_rule="all")(x)
    output_step = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(all_planes, of_dequantized) < 2e-4 + output_step


def test_nothing_is_squeezed_through_fp16():
    # bf16 and fp32 values beyond fp16's 65504, and weights below its smallest subnormal 6e-8.
    for dtype in (torch.float32, torch.bfloat16):
        linear = a_linear(bias=False, dtype=dtype)
        linear.weight.mul_(1e-9)
        x = rows(dtype=dtype) * 1e8
        y = Int8Linear.from_linear(linear, outlier_rule="row_rms", outlier_threshold=4.0)(x)
        assert relative_error(y, x.double() @ linear.weight.double().T) < 0.015


def test_leading_dimensions_and_no_rows():
    layer = Int8Linear.from_linear(a_linear())
    x = rows(12)
    assert torch.equal(layer(x.view(3, 4, 96)), layer(x).view(3, 4, 56))
    assert torch.equal(layer(x[0]), layer(x)[0])
    assert layer(x[:0]).shape == (0, 56)


@pytest.mark.parametrize(("rule", "threshold"), RULES)
@pytest.mark.parametrize("hot", [None, HOT])
def test_batch_invariance(rule, threshold, hot):
    layer = Int8Linear.from_linear(a_linear(K=200), threshold, rule, hot)
    x = rows(65, K=200)
    x[10] = 0
    x[11, 0] = float("nan")
    x[12, 1] = float("inf")
    together = layer(x)
    for start, stop in ((0, 1), (9, 14), (3, 40), (64, 65)):
        part = layer(x[start:stop])
        assert torch.equal(part.isnan(), together[start:stop].isnan())
        assert torch.equal(part.nan_to_num(), together[start:stop].nan_to_num())
    assert together[11:13].isnan().all() and not together[[9, 10, 13]].isnan().any()


def test_a_long_sum_does_not_overflow():
    K = 131_072
    linear = nn.Linear(K, 2, bias=False).requires_grad_(False)
    linear.weight.fill_(1.0)
    for rule in ("none", "all"):
        y = Int8Linear.from_linear(linear, outlier_rule=rule)(torch.ones(1, K))
        torch.testing.assert_close(y, torch.full((1, 2), float(K)), rtol=1e-6, atol=0)


def test_dequantize_is_within_half_a_step_and_exact_in_hot_columns():
    linear = a_linear()
    linear.weight[:, HOT] *= 100  # would spoil every scale if they counted
    layer = Int8Linear.from_linear(linear, hot_columns=HOT)
    weight = layer.dequantize()
    cold = [k for k in range(96) if k not in HOT]
    step = linear.weight[:, cold].abs().amax(dim=1, keepdim=True) / 127
    assert ((weight - linear.weight)[:, cold].abs() <= 0.5 * step * (1 + 1e-5)).all()
    assert torch.equal(weight[:, HOT], linear.weight[:, HOT])
    assert layer.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("rule", "threshold"), RULES)
def test_hot_columns_are_exact(rule, threshold):
    linear, x = a_linear(), rows()
    layer = Int8Linear.from_linear(linear, threshold, rule, hot_columns=HOT)
    only_hot = torch.zeros_like(x)
    only_hot[:, HOT] = x[:, HOT]
    exact = nn.functional.linear(only_hot.double(), linear.weight.double(), linear.bias.double())
    torch.testing.assert_close(layer(only_hot).double(), exact, rtol=1e-5, atol=1e-5)
    # They are taken out of the integers: the rest rounds as if they were not there.
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    with_hot, without = layer(x), Int8Linear.from_linear(linear, threshold, rule)(x)
    assert relative_error(with_hot, exact) < relative_error(without, exact) / 3


def test_hot_weights_keep_the_dtype_of_the_checkpoint():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = Int8Linear.from_linear(a_linear(dtype=dtype), hot_columns=torch.tensor(HOT))
        assert layer.hot_weight.dtype == dtype and layer.hot_columns.dtype == torch.int32
        assert layer(rows(dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("hot", [None, HOT])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip(hot, bias, tmp_path):
    layer, x = Int8Linear.from_linear(a_linear(bias=bias), hot_columns=hot), rows()
    names = {"weight_int8", "col_scale"} | ({"bias"} if bias else set())
    names |= {"hot_columns", "hot_weight"} if hot else set()
    assert set(layer.state_dict()) == names
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = safetensors.torch.load_file(tmp_path / "layer.safetensors")
    # Into a layer without hot columns; by copy, by assignment, and into the meta device.
    copied = Int8Linear(96, 56, bias)
    copied.load_state_dict(state)
    assigned = Int8Linear(96, 56, bias, device="meta")
    assigned.load_state_dict(state, assign=True)
    moved = Int8Linear(96, 56, bias, hot_columns=hot, device="meta").to_empty(device="cpu")
    moved.load_state_dict(state)
    for other in (copied, assigned, moved, copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.dequantize(), layer.dequantize())


def test_the_state_of_a_rotated_layer_brings_its_rotation():
    x = rows()
    rotated = Int8Linear.from_linear(a_linear(), rotation=32)
    plain = Int8Linear.from_linear(a_linear())
    assert (rotated.outlier_rule, plain.outlier_rule) == ("none", "absolute")
    other = nn.Sequential(Int8Linear(96, 56, outlier_rule="none"))
    other.load_state_dict(nn.Sequential(rotated).state_dict())
    assert other[0].rotation == 32 and torch.equal(other(x), rotated(x))
    other.load_state_dict(nn.Sequential(plain).state_dict())
    assert other[0].rotation == 0 and torch.equal(other[0].dequantize(), plain.dequantize())
    wrong = {**rotated.state_dict(), "rotation": torch.tensor(3)}
    with pytest.raises(ValueError, match="rotation must be 0 or a power of two"):
        other[0].load_state_dict(wrong)


def test_state_dict_of_another_shape_is_refused():
    state = Int8Linear.from_linear(a_linear(K=64)).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for weight_int8"):
        Int8Linear(96, 56).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        Int8Linear(96, 56).load_state_dict(
            Int8Linear.from_linear(a_linear(bias=False)).state_dict()
        )


@pytest.mark.parametrize("hot", [None, HOT])
def test_meta_layer_is_filled_by_quantize(hot):
    linear, x = a_linear(dtype=torch.bfloat16), rows()
    with torch.device("meta"):
        layer = Int8Linear.from_linear(nn.Linear(96, 56, dtype=torch.bfloat16), hot_columns=hot)
    assert all(layer.get_buffer(name).is_meta for name in ("weight_int8", "col_scale", "bias"))
    assert layer.quantize_(linear.weight, linear.bias) is layer
    expected = Int8Linear.from_linear(linear, hot_columns=hot)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer(x), expected(x))


def test_quantize_in_slices_is_the_same(monkeypatch):
    linear = a_linear()
    whole = Int8Linear.from_linear(linear, hot_columns=HOT)
    monkeypatch.setattr("dist_int8.int8.linear.QUANTIZE_SLICE", 96 * 5)
    sliced = Int8Linear.from_linear(linear, hot_columns=HOT)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, sliced.state_dict()[name])


def test_the_layer_does_not_share_memory_with_its_linear():
    linear, x = a_linear(), rows()
    layer = Int8Linear.from_linear(linear, hot_columns=HOT)
    before = layer(x)
    linear.weight.zero_()
    linear.bias.zero_()
    assert torch.equal(layer(x), before)
    assert not list(layer.parameters())


def test_casts_leave_the_numbers_alone():
    layer, x = Int8Linear.from_linear(a_linear(), hot_columns=HOT), rows()
    before = layer(x)
    for cast in (layer.half(), layer.to(torch.bfloat16), layer.double().float()):
        assert cast is layer
        assert layer.col_scale.dtype == torch.float32
        assert torch.equal(layer(x), before)
    assert layer(x.half()).dtype == torch.float16
    assert layer.to("meta").weight_int8.is_meta


def test_a_new_layer_is_zero():
    layer = Int8Linear(8, 4, hot_columns=[1])
    assert torch.equal(layer(torch.randn(3, 8)), torch.zeros(3, 4))


def test_repr_tells_shapes_rule_and_threshold():
    layer = Int8Linear.from_linear(a_linear(), 4.0, "row_rms", HOT)
    assert repr(layer) == (
        "Int8Linear(in_features=96, out_features=56, bias=True, outlier_rule='row_rms', "
        "outlier_threshold=4.0, num_hot_columns=4, rotation=0)"
    )
    assert "outlier_rule='absolute', outlier_threshold=6.0" in repr(
        Int8Linear.from_linear(a_linear())
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Int8Linear(8, 4, outlier_rule="median"), "outlier_rule must be one of"),
        (lambda: Int8Linear(8, 4, outlier_threshold=-1.0), "outlier_threshold must be"),
        (lambda: Int8Linear(8, 4, hot_columns=[8]), r"hot_columns must be input features 0 .. 7"),
        (lambda: Int8Linear(8, 4, hot_columns=[-1]), r"got \[-1\]"),
        (lambda: Int8Linear(8, 4, hot_columns=[2, 2]), "hot_columns must be distinct"),
        (
            lambda: Int8Linear(8, 4, bias=False).quantize_(torch.ones(8, 4)),
            r"weight must be floating \[4, 8\], got torch.float32 \[8, 4\]",
        ),
        (
            lambda: Int8Linear(8, 4, bias=False).quantize_(torch.ones(4, 8, dtype=torch.int8)),
            "got torch.int8",
        ),
        (lambda: Int8Linear(8, 4).quantize_(torch.ones(4, 8)), r"bias must be \[4\], got None"),
        (
            lambda: Int8Linear(8, 4, bias=False).quantize_(torch.ones(4, 8), torch.ones(4)),
            r"bias must be None, got \[4\]",
        ),
        (
            lambda: Int8Linear(8, 4).quantize_(torch.ones(4, 8), torch.ones(3)),
            r"bias must be \[4\], got \[3\]",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_inputs_are_named():
    layer = Int8Linear(8, 4)
    with pytest.raises(ValueError, match=r"Int8Linear: x must be \[\.\.\., K=8\], got \[2, 7\]"):
        layer(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"int8_linear: x must be .* got .*(double|float64)"):
        layer(torch.ones(2, 8, dtype=torch.float64))
