"""`Int8Linear.weight`, as modules of torch and transformers read it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

import dist_int8
from dist_int8.int8.linear import Int8Linear


def a_layer(dtype=torch.bfloat16) -> tuple[Int8Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = Int8Linear.from_linear(nn.Linear(64, 32, dtype=dtype), hot_columns=[3, 9])
    return layer, layer.dequantize(dtype)


def test_what_generic_code_asks_for():
    layer, expected = a_layer()
    weight = layer.weight
    assert isinstance(weight, torch.Tensor) and weight.is_floating_point()
    for name in ("dtype", "device", "shape", "ndim", "is_meta", "layout", "is_cuda", "grad"):
        assert getattr(weight, name) == getattr(expected, name), name
    for name in ("numel", "element_size", "size", "stride", "is_contiguous"):
        assert getattr(weight, name)() == getattr(expected, name)(), name
    assert not weight.requires_grad and weight.requires_grad_(False) is weight
    assert not list(layer.parameters()) and "weight" not in layer.state_dict()


def test_its_dtype_follows_the_casts_of_the_module():
    layer, _ = a_layer()
    assert layer.half().weight.dtype == torch.float16
    assert layer.to(torch.float32).weight.dtype == torch.float32
    assert copy.deepcopy(layer.bfloat16()).weight.dtype == torch.bfloat16
    assert Int8Linear(4, 4).weight.dtype == torch.get_default_dtype()
    meta = layer.to("meta").weight
    assert meta.is_meta and meta.float().sum().is_meta


@pytest.mark.parametrize(
    "read",
    [
        lambda weight: weight.T,
        lambda weight: weight.data,
        lambda weight: weight.detach().float(),
        lambda weight: weight.to(torch.float32),
        lambda weight: weight[3:5, ::2],
        lambda weight: torch.stack([weight, weight]),
        lambda weight: torch.linalg.vector_norm(weight),
        lambda weight: functional.linear(torch.ones(2, 64, dtype=torch.bfloat16), weight),
        lambda weight: copy.deepcopy(weight),
        lambda weight: pickle.loads(pickle.dumps(weight)),
        lambda weight: torch.as_tensor(weight.tolist()),
        lambda weight: torch.from_numpy(weight.float().numpy()),
        lambda weight: torch.from_dlpack(weight),
        lambda weight: torch.tensor(repr(weight) == str(weight)),
        lambda weight: torch.tensor([weight.is_shared(), weight.is_pinned()]),
        lambda weight: torch.tensor([len(row) for row in weight]),
    ],
)
def test_its_values_are_the_dequantized_ones(read):
    layer, expected = a_layer()
    found = read(layer.weight)
    assert torch.equal(found, read(expected))
    assert found.dtype == read(expected).dtype


def test_gradients_of_what_multiplies_by_it():
    layer, expected = a_layer(torch.float32)
    x = torch.randn(5, 64, requires_grad=True)
    grads = [torch.autograd.grad((x @ w.T).square().sum(), x)[0] for w in (layer.weight, expected)]
    assert torch.equal(*grads)


def change_data(layer):
    layer.weight.data = torch.ones(32, 64)


def add_to_data(layer):
    layer.weight.data += 1


def set_requires_grad(layer):
    layer.weight.requires_grad = True


@pytest.mark.parametrize(
    "change",
    [
        change_data,
        add_to_data,
        set_requires_grad,
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: layer.weight.zero_(),
        lambda layer: layer.weight.data.normal_(),
        lambda layer: nn.init.xavier_uniform_(layer.weight),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: torch.mul(torch.ones(32, 64), 2, out=layer.weight),
        lambda layer: nn.Parameter(layer.weight),
    ],
)
def test_it_cannot_be_changed_without_a_word(change):
    layer, expected = a_layer(torch.float32)
    with pytest.raises(RuntimeError, match=r"cannot be changed in place .* quantize_\(weight"):
        change(layer)
    assert torch.equal(layer.weight, expected)


def test_it_cannot_be_assigned():
    layer, expected = a_layer()
    with pytest.raises(AttributeError, match=r"in int8 and cannot be assigned; .* quantize_"):
        layer.weight = nn.Parameter(expected)
    with pytest.raises(AttributeError):
        layer.weight = expected
    assert "weight" not in layer.state_dict()


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_layer_of_torch_computes_in_int8(with_grad, training):
    # Its fast path would read the weights instead of calling the layers.
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    plain = copy.deepcopy(encoder).train(training)
    encoder.linear1 = Int8Linear.from_linear(encoder.linear1, outlier_rule="all")
    encoder.linear2 = Int8Linear.from_linear(encoder.linear2, outlier_rule="all")
    encoder.self_attn.out_proj = Int8Linear.from_linear(encoder.self_attn.out_proj)
    with torch.no_grad():
        plain.linear1.weight.copy_(encoder.linear1.weight)
        plain.linear2.weight.copy_(encoder.linear2.weight)
        plain.self_attn.out_proj.weight.copy_(encoder.self_attn.out_proj.weight)
    x = torch.randn(2, 5, 64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(with_grad):
        y = encoder.train(training)(x, src_key_padding_mask=padding)
        expected = plain(x, src_key_padding_mask=padding)
        calls = []
        encoder.linear1.register_forward_hook(lambda *_: calls.append(1))
        encoder(x)
    torch.testing.assert_close(y[~padding], expected[~padding], rtol=1e-3, atol=1e-3)
    assert calls
    with torch.inference_mode():
        whole = nn.TransformerEncoder(encoder.eval(), 2)(x, src_key_padding_mask=padding)
    assert whole.shape == x.shape


@torch.inference_mode()
def test_models_that_read_the_dtype_of_a_weight():
    # T5 casts what goes into `wo` to the dtype of its weight.
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.arange(12)[None]
    before = model(ids, decoder_input_ids=ids).logits
    after = dist_int8.convert(model)(ids, decoder_input_ids=ids).logits
    assert (after - before).norm() / before.norm() < 0.05
    assert model.bfloat16()(ids, decoder_input_ids=ids).logits.dtype == torch.bfloat16
    assert model.get_memory_footprint() > 0


def test_a_layer_is_saved_whole():
    layer, expected = a_layer()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.weight, expected)
