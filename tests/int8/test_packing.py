"""Packed weights: the same numbers from the ops, and the row-major matrix for everyone else."""

import copy
import pickle

import pytest
import torch

from dist_int8.int8 import ops, packing
from dist_int8.int8.embedding import Int8Embedding
from dist_int8.int8.linear import Int8Linear

compiled = pytest.mark.skipif(
    ops.library_info()["path"] is None, reason="needs the compiled library"
)


def make_layer(N=48, K=96, num_hot=8, rotation=32):
    torch.manual_seed(N * K)
    linear = torch.nn.Linear(K, N)
    columns = list(range(1, 1 + num_hot))
    return Int8Linear.from_linear(linear, 4.0, "none", columns, rotation)


def test_strips_hold_four_features_of_sixteen_outputs():
    rows = torch.arange(-128, 128, dtype=torch.int8).view(32, 8)
    expected = rows.clone()
    packed = packing.pack_(rows, packing.GROUP)
    assert packed.shape == (2, 2, 16, 4) and packed.data_ptr() == rows.data_ptr()
    for n in range(32):
        for k in range(8):
            assert packed[n // 16, k // 4, n % 16, k % 4] == expected[n, k]
    assert torch.equal(packing.unpack(packed), expected)
    index = torch.tensor([31, 0, 17, 17])
    assert torch.equal(packing.rows_of(packed, index), expected[index])


@compiled
@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize(("N", "K"), [(16, 4), (48, 96), (144, 1028)])
@pytest.mark.parametrize("rule", [("none", 0.0), ("row_rms", 2.0), ("all", 0.0)])
def test_the_ops_give_the_same_bits(M, N, K, rule):
    layer = make_layer(N, K, num_hot=min(K // 2, 8))
    layer.outlier_rule, layer.outlier_threshold = rule
    x = torch.randn(M, K)
    rows = ops.quantize_rows(x, *layer.quantization)
    expected = layer(x), layer(rows)
    layer.pack_()
    assert layer._buffers["weight_int8"].dim() == 4
    assert torch.equal(layer(x), expected[0]) and torch.equal(layer(rows), expected[1])


@compiled
def test_a_packed_layer_reads_saves_and_copies_as_before():
    layer = make_layer()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    weight, x = layer.dequantize(), torch.randn(3, 96)
    expected = layer(x)
    layer.pack_()
    assert torch.equal(layer.weight_int8, state["weight_int8"])
    assert torch.equal(layer.dequantize(), weight) and torch.equal(layer.weight.clone(), weight)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half()):
        assert torch.equal(other(x), expected)
        assert all(torch.equal(other.state_dict()[name], state[name]) for name in state)
    assert layer.to("meta").weight_int8.shape == (48, 96)


@compiled
def test_a_packed_layer_takes_a_state():
    source, layer = make_layer(), make_layer().pack_()
    source.quantize_(torch.randn(48, 96), torch.randn(48))
    layer.load_state_dict(source.state_dict())
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), source(x))


@compiled
@pytest.mark.parametrize(("N", "K"), [(17, 96), (48, 95)])
def test_what_is_not_whole_stays_row_major(N, K):
    layer = make_layer(N, K).pack_()
    assert layer._buffers["weight_int8"].shape == (N, K)


@compiled
def test_an_embedding_that_a_head_shares():
    embedding, head = Int8Embedding(32, 8), Int8Linear(8, 32, bias=False)
    embedding.weight_int8.random_(-127, 128)
    embedding.col_scale.uniform_()
    ids = torch.tensor([3, 31, 3])
    expected = embedding(ids, torch.float32)
    head.share_weight(embedding.pack_())
    assert head._buffers["weight_int8"] is embedding._buffers["weight_int8"]
    assert torch.equal(embedding(ids, torch.float32), expected)
    assert torch.equal(head.weight_int8, embedding.weight_int8)


@compiled
@pytest.mark.parametrize("K", [92, 94, 23])
def test_misshapen_packed_weights_are_refused(K):
    layer = make_layer().pack_()
    with pytest.raises(ValueError, match="weight_int8 must be"):
        ops.int8_linear(
            torch.randn(2, K),
            layer._buffers["weight_int8"],
            layer.col_scale,
            outlier_rule="none",
            outlier_threshold=0.0,
        )
