"""transformers' logits processors for the rarer rules, on the device of the logits.

`ops.sample_tokens` and `ops.penalize_logits` know what nearly every request uses. A request with
one of these rules runs its own row through processors; some of them read its tokens on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from dist_int8.pipeline.rules import Rule, RuleKind

# The processor of transformers for the rules of one kind; only of biases there are several.
_PROCESSORS: dict[RuleKind, Callable[[Sequence[Rule]], LogitsProcessor]] = {
    RuleKind.BIAS: lambda rules: SequenceBiasLogitsProcessor(
        {rule.token_ids: rule.value for rule in rules}
    ),
    RuleKind.NO_REPEAT: lambda rules: NoRepeatNGramLogitsProcessor(rules[0].number),
    RuleKind.MIN_LENGTH: lambda rules: MinLengthLogitsProcessor(
        rules[0].number, list(rules[0].token_ids)
    ),
    RuleKind.FORCED_FIRST: lambda rules: ForcedBOSTokenLogitsProcessor(rules[0].token_ids[0]),
    RuleKind.FORCED_LAST: lambda rules: ForcedEOSTokenLogitsProcessor(
        rules[0].number, list(rules[0].token_ids)
    ),
    RuleKind.REMOVE_INVALID: lambda rules: InfNanRemoveLogitsProcessor(),
    RuleKind.DECAY: lambda rules: ExponentialDecayLengthPenalty(
        (rules[0].number, rules[0].value), list(rules[0].token_ids), input_ids_seq_length=0
    ),
    RuleKind.SUPPRESS: lambda rules: SuppressTokensLogitsProcessor(rules[0].token_ids),
    RuleKind.SUPPRESS_FIRST: lambda rules: SuppressTokensAtBeginLogitsProcessor(
        rules[0].token_ids, rules[0].number
    ),
    RuleKind.TOP_H: lambda rules: TopHLogitsWarper(rules[0].value),
    RuleKind.TYPICAL_P: lambda rules: TypicalLogitsWarper(rules[0].value),
    RuleKind.EPSILON: lambda rules: EpsilonLogitsWarper(rules[0].value),
    RuleKind.ETA: lambda rules: EtaLogitsWarper(rules[0].value),
}
_WARPERS = (RuleKind.TOP_H, RuleKind.TYPICAL_P, RuleKind.EPSILON, RuleKind.ETA)


class Processors:
    """What the rules of one request do to its row of logits, in the order of transformers.

    Args:
        rules: of the request.
        settings: its sampling settings by name.

    Attributes:
        warps: whether temperature, top_k, top_p and min_p are applied here too, because one of the
            rules comes between them or after them.
    """

    def __init__(self, rules: Sequence[Rule], settings: dict[str, float]) -> None:
        self._biases = _make(rules, RuleKind.BIAS)
        after = [kind for kind in _PROCESSORS if kind not in (RuleKind.BIAS, *_WARPERS)]
        self._after_penalties = _make(rules, *after)
        self.warps = any(rule.kind in _WARPERS for rule in rules)
        if self.warps:
            self._after_penalties += _make_warpers(rules, settings)

    def before_penalties(self, token_ids: Tensor, logits: Tensor) -> None:
        """Changes logits fp32 [1, V] in place, of a sequence of token_ids int64 [1, L]."""
        if self._biases:
            logits.copy_(self._biases(token_ids, logits))

    def after_penalties(self, token_ids: Tensor, logits: Tensor) -> None:
        """The same, once repetition, presence and frequency penalties are applied."""
        if self._after_penalties:
            logits.copy_(self._after_penalties(token_ids, logits))


def _make(rules: Sequence[Rule], *kinds: RuleKind) -> LogitsProcessorList:
    """Makes the processors of these kinds, in their order."""
    return LogitsProcessorList(
        _PROCESSORS[kind](chosen)
        for kind in kinds
        if (chosen := [rule for rule in rules if rule.kind == kind])
    )


def _make_warpers(rules: Sequence[Rule], settings: dict[str, float]) -> LogitsProcessorList:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
    warpers += _make(rules, RuleKind.TOP_H)
    if settings["top_k"] > 0:
        warpers.append(TopKLogitsWarper(int(settings["top_k"])))
    if settings["top_p"] < 1.0:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if settings["min_p"] > 0:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    return warpers + _make(rules, RuleKind.TYPICAL_P, RuleKind.EPSILON, RuleKind.ETA)
