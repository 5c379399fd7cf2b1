"""Neighbouring blocks in one call: the same bits as op by op, and no hook is bypassed."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dist_int8.int8 import kv, ops
from dist_int8.int8.decoder_blocks import PreparedBlocks
from dist_int8.int8.linear import Int8Linear
from dist_int8.models import run_blocks as blocks_module
from dist_int8.models.block import DecoderBlock, Norm, PositionTables
from dist_int8.models.block_calls import BlockCalls
from dist_int8.models.run_blocks import run_blocks
from dist_int8.models.spec import BlockSpec

HIDDEN, HEAD_DIM, MAX_TOKENS = 48, 16, 40
ARRANGEMENTS = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "biases and a layer norm": {
        "norm": "layer",
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    "window": {"window": 4},
}
OTHERS = {
    "norm_after": {"norm_after": True},
    "residual_from_norm": {"residual_from_norm": True},
    "parallel_residual": {"parallel_residual": True},
    "not gated": {"gated": False, "activation": "gelu"},
}

KEPT = BlockCalls()  # over all tests, so that every change has to be noticed


def make_block(hot_columns=None, threshold=4.0, **changes):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 100, "num_heads": 6, "num_kv_heads": 2}
    plain = {"head_dim": HEAD_DIM, "norm": "rms", "norm_eps": 1e-5, "gated": True}
    block = DecoderBlock(BlockSpec(**{**sizes, **plain, **changes}))
    for parameter in block.parameters():
        parameter.data.normal_()
    for name, child in list(block.named_children()):
        if isinstance(child, nn.Linear):
            setattr(block, name, Int8Linear.from_linear(child, threshold, "row_rms", hot_columns))
    return block


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """The number of blocks in every call of the op."""
    numbers = []

    class Counted(PreparedBlocks):
        def __init__(self, x, tensors, settings):
            super().__init__(x, tensors, settings)
            self.num_blocks = len(tensors.norms) // 4

        def run(self, *args):
            numbers.append(self.num_blocks)
            return super().run(*args)

    monkeypatch.setattr(blocks_module, "PreparedBlocks", Counted)
    return numbers


def run(blocks, int8_kv=False, dtype=torch.float32):
    """Everything that results from a prefill of two sequences and a step of decoding."""

    def cache(*shape):
        zeros = torch.zeros(3, 2, *shape, dtype=torch.int8 if int8_kv else dtype)
        return kv.Int8KV(zeros, torch.zeros(3, 2, MAX_TOKENS)) if int8_kv else zeros

    caches = [(cache(HEAD_DIM, MAX_TOKENS), cache(MAX_TOKENS, HEAD_DIM)) for _ in blocks]
    generator = torch.Generator().manual_seed(1)
    angles = torch.rand(MAX_TOKENS, 5, generator=generator) * 6
    slopes = torch.rand(6, generator=generator)
    tables = PositionTables(angles.cos(), angles.sin(), slopes)
    results = []
    for segments in ([(2, 0, 7), (0, 0, 3)], [(2, 7, 1), (0, 3, 1)]):
        num_tokens = sum(count for _, _, count in segments)
        x = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
        x[:, 7] *= 30
        where = ops.Segments.of(torch.tensor(segments, dtype=torch.int32))
        results += run_blocks(blocks, x, where, lambda index: caches[index], tables, KEPT)
    for layer in caches:
        for one in layer:
            results += one if int8_kv else [one]
    return [tensor for tensor in results if tensor is not None]


def op_by_op(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(blocks_module, "runs", lambda x: False)
        return run(*args, **kwargs)


def assert_same_bits(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("int8_kv", [False, True], ids=["float KV", "int8 KV"])
@pytest.mark.parametrize("hot_columns", [None, [3, 7]], ids=["no hot", "hot"])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_one_call_gives_the_same_bits(name, hot_columns, int8_kv, calls, monkeypatch):
    blocks = [make_block(hot_columns, **ARRANGEMENTS[name]) for _ in range(3)]
    expected = op_by_op(monkeypatch, blocks, int8_kv)
    assert calls == []
    assert_same_bits(run(blocks, int8_kv), expected)
    assert calls == [3, 3]


@pytest.mark.parametrize("name", OTHERS)
def test_another_arrangement_runs_op_by_op(name, calls, monkeypatch):
    blocks = [make_block(), make_block(**OTHERS[name]), make_block(), make_block()]
    expected = op_by_op(monkeypatch, blocks)
    assert_same_bits(run(blocks), expected)
    assert calls == [1, 2] * 2


@pytest.mark.parametrize("change", [{"window": 4}, {"threshold": 2.0}, {"norm_eps": 0.1}])
def test_blocks_that_differ_are_not_run_together(change, calls, monkeypatch):
    blocks = [make_block(), make_block(), make_block(**change)]
    expected = op_by_op(monkeypatch, blocks)
    assert_same_bits(run(blocks), expected)
    assert calls == [2, 1] * 2


def test_a_linear_that_is_not_int8_or_has_its_own_rule_runs_op_by_op(calls, monkeypatch):
    floating, own_rule = make_block(), make_block()
    floating.down = nn.Linear(100, HIDDEN, bias=False)
    own_rule.gate_up.outlier_threshold = 1.0
    blocks = [floating, own_rule]
    with torch.inference_mode():  # a floating linear's weight requires grad
        assert_same_bits(run(blocks), op_by_op(monkeypatch, blocks))
    assert calls == []


@pytest.mark.parametrize("name", ["", "attention_norm", "qkv", "down"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_module_with_a_hook_is_called(name, kind, calls):
    blocks = [make_block(), make_block()]
    seen = []
    watched = blocks[1].get_submodule(name)
    handle = getattr(watched, kind)(lambda module, *_: seen.append(module))
    run(blocks)
    assert seen == [watched, watched] and calls == [1, 1]
    handle.remove()
    run(blocks)
    assert len(seen) == 2 and calls == [1, 1, 2, 2]


def test_a_linear_with_a_hook_of_accelerate_runs_op_by_op(calls):
    seen = []

    class Watch(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    block = make_block()
    add_hook_to_module(block.down, Watch())
    run([block])
    assert seen == [block.down] * 2 and calls == []


def test_a_hook_on_all_modules_sees_them_called(calls):
    seen = []
    handle = register_module_forward_pre_hook(lambda module, _: seen.append(type(module)))
    try:
        run([make_block()])
    finally:
        handle.remove()
    assert seen.count(Int8Linear) == 2 * 4 and calls == []


class OtherNorm(Norm):
    def forward(self, x, residual):
        normed, total = super().forward(x, residual)
        return normed * 2, total


class OtherBlock(DecoderBlock):
    def forward(self, *args):
        x, residual = super().forward(*args)
        return x * 2, residual


class Wrapper(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.forward, self.before = norm, norm.forward, norm.before


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.attention_norm, "__class__", OtherNorm),
        lambda block: setattr(block, "__class__", OtherBlock),
        lambda block: setattr(block, "attention_norm", Wrapper(block.attention_norm)),
        lambda block: setattr(block.mlp_norm, "eps", 0.5),
        lambda block: setattr(block, "scale", 0.9),
    ],
    ids=["norm", "block", "wrapper", "eps", "scale"],
)
def test_a_changed_block_computes_its_changed_function(change, monkeypatch):
    blocks = [make_block(), make_block()]
    before = run(blocks)
    change(blocks[1])
    after = run(blocks)
    assert not torch.equal(before[0], after[0]) or isinstance(blocks[1].attention_norm, Wrapper)
    assert_same_bits(after, op_by_op(monkeypatch, blocks))


def test_compiles_without_graph_breaks(calls):
    blocks = [make_block(), make_block()]
    caches = [torch.zeros(1, 2, HEAD_DIM, MAX_TOKENS), torch.zeros(1, 2, MAX_TOKENS, HEAD_DIM)]
    segments = ops.Segments.of(torch.tensor([[0, 0, 3]], dtype=torch.int32))

    def step(x):
        tables = PositionTables(None, None, None)
        return run_blocks(blocks, x, segments, lambda index: caches, tables, BlockCalls())

    x = torch.randn(3, HIDDEN)
    expected = step(x)
    compiled = torch.compile(step, backend="eager", fullgraph=True)(x)
    assert_same_bits(compiled, expected)
    assert calls == [2]


def test_a_copy_of_a_stage_looks_at_its_own_modules(calls):
    blocks = nn.ModuleList([make_block(), make_block()])
    blocks.kept = BlockCalls()
    blocks.kept.of(tuple(blocks))
    copied = copy.deepcopy(blocks)
    seen = []
    copied[0].down.register_forward_hook(lambda *_: seen.append(1))
    rules = [call.rule for call in copied.kept.of(tuple(copied))]
    assert rules[0] is None and len(rules) == 2
    assert len(blocks.kept.of(tuple(blocks))) == 1


def test_sixteen_bits_run_op_by_op(calls):
    run([make_block().to(torch.bfloat16)], dtype=torch.bfloat16)
    assert calls == []


def test_no_blocks_leave_x_as_it_is():
    x = torch.randn(2, HIDDEN)
    segments = ops.Segments.of(torch.tensor([[0, 0, 2]], dtype=torch.int32))
    tables = PositionTables(None, None, None)
    got, residual = run_blocks([], x, segments, lambda index: None, tables, BlockCalls())
    assert got is x and residual is None
