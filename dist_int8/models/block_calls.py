"""Which neighbouring blocks run in one call of `decoder_blocks`, and with which tensors.

Looking at 30 blocks before every step takes 0.6 ms, 6% of the time of a token of SmolLM2-135M, so
what was found is kept, and before every step it is only checked that nothing has changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter, methodcaller
from typing import Any

from torch import Tensor, nn

from dist_int8.int8.decoder_blocks import LinearRule, PreparedBlocks
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.block import DecoderBlock, Norm

# What `decoder_blocks` reads of a block, in its order.
NORMS = ("attention_norm", "mlp_norm")
LINEARS = ("qkv", "attention_output", "gate_up", "down")

_child_modules = methodcaller("values")
_norm_tensors = itemgetter("weight", "bias")
_linear_tensors = itemgetter("weight_int8", "col_scale", "bias", "hot_columns", "hot_weight")
_block_rule = itemgetter("spec", "scale")
_norm_rule = itemgetter("kind", "eps")
_linear_rule = itemgetter("outlier_rule", "outlier_threshold", "rotation")


@dataclass
class BlockCall:
    """Neighbouring blocks that run in one call, or one by one.

    Attributes:
        rule: what they have in common: spec, scale of the scores, kind and eps of the norms,
            `LinearRule`; None where they run one by one.
        blocks: these blocks.
        parameters: of their norms; the modules' own dictionary, so that it shows what it holds now.
        buffers: of their linears, likewise.
        prepared: of the last run.
    """

    rule: tuple[Any, ...] | None
    blocks: tuple[DecoderBlock, ...]
    parameters: Sequence[dict[str, Tensor | None]]
    buffers: Sequence[dict[str, Tensor | None]]
    prepared: PreparedBlocks | None = None

    def norm_tensors(self) -> list[Tensor | None]:
        """Weight and bias of every norm."""
        return list(chain.from_iterable(map(_norm_tensors, self.parameters)))

    def linear_tensors(self) -> list[Tensor | None]:
        """weight_int8, col_scale, bias, hot_columns and hot_weight of every linear."""
        return list(chain.from_iterable(map(_linear_tensors, self.buffers)))


class BlockCalls:
    """The calls of a stage's blocks."""

    def __init__(self) -> None:
        self._blocks: tuple[DecoderBlock, ...] = ()
        self._calls: list[BlockCall] = []
        # the blocks and their children, and dictionaries that are these modules' own
        self._modules: list[nn.Module] = []
        self._children: list[dict[str, Any]] = []  # of the blocks
        self._attributes: list[dict[str, Any]] = []
        self._norms: list[dict[str, Any]] = []  # attributes of the norms
        self._linears: list[dict[str, Any]] = []  # attributes of the linears
        self._hooks: list[dict[int, Any]] = []
        self._seen: tuple[list[Any], ...] = ()

    def __reduce__(self) -> tuple[type["BlockCalls"], tuple[()]]:
        return BlockCalls, ()  # a copy is of other modules

    def of(self, blocks: tuple[DecoderBlock, ...]) -> list[BlockCall]:
        """The calls that run these blocks as they are now."""
        if blocks != self._blocks or self._look() != self._seen:
            self._renew(blocks)
        return self._calls

    def _look(self) -> tuple[list[Any], ...]:
        """All that the calls depend on."""
        return (
            list(map(list, map(_child_modules, self._children))),
            list(map(type, self._modules)),
            list(map(_block_rule, self._attributes[: len(self._blocks)])),
            list(map(_norm_rule, self._norms)),
            list(map(_linear_rule, self._linears)),
            list(map(len, self._attributes)),  # accelerate puts a `forward` on the module itself
            list(map(len, self._hooks)),
        )

    def _renew(self, blocks: tuple[DecoderBlock, ...]) -> None:
        self._blocks = blocks
        self._calls = [
            _make_call(rule, tuple(some)) for rule, some in groupby(blocks, _rule_in_one_call)
        ]
        children = [child for block in blocks for child in block._modules.values()]
        modules: list[Any] = [*blocks, *children]
        self._modules = modules
        self._children = [block._modules for block in blocks]
        self._attributes = [module.__dict__ for module in modules]
        self._norms = [child.__dict__ for child in children if type(child) is Norm]
        self._linears = [child.__dict__ for child in children if type(child) is Int8Linear]
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._seen = self._look()


def _make_call(rule: tuple[Any, ...] | None, blocks: tuple[DecoderBlock, ...]) -> BlockCall:
    if rule is None:
        return BlockCall(None, blocks, (), ())
    modules: list[dict[str, Any]] = [block._modules for block in blocks]
    return BlockCall(
        rule,
        blocks,
        [children[name]._parameters for children in modules for name in NORMS],
        [children[name]._buffers for children in modules for name in LINEARS],
    )


def _rule_in_one_call(block: DecoderBlock) -> tuple[Any, ...] | None:
    """What blocks of one call have in common; None where a block has to run op by op.

    It has to where its arrangement is not that of `decoder_blocks`, where a part is not one of our
    own classes, where its two norms or four linears differ in their rule, and where a module has
    hooks, which expect it to be called.
    """
    spec = block.spec
    if not spec.gated or spec.norm_after or spec.residual_from_norm or spec.parallel_residual:
        return None
    if type(block) is not DecoderBlock or _is_watched(block):
        return None
    modules: dict[str, Any] = block._modules
    for names, kind in ((NORMS, Norm), (LINEARS, Int8Linear)):
        if any(type(modules[name]) is not kind or _is_watched(modules[name]) for name in names):
            return None
    norm_rules = {_norm_rule(modules[name].__dict__) for name in NORMS}
    linear_rules = {_linear_rule(modules[name].__dict__) for name in LINEARS}
    if len(norm_rules) > 1 or len(linear_rules) > 1:
        return None
    return spec, block.scale, *norm_rules.pop(), LinearRule(*linear_rules.pop())


def _is_watched(module: nn.Module) -> bool:
    # accelerate's hooks put another `forward` on the module itself
    replaced = "forward" in module.__dict__
    return bool(replaced or module._forward_hooks or module._forward_pre_hooks)
