"""Turns the settings of a request into the rules that the last stage follows for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from dist_int8.config import GenerationSettings
from dist_int8.pipeline.rules import MAX_RULE_WORDS, Rule, RuleKind, count_words

_SAMPLING_RULES = (
    (RuleKind.TOP_H, "top_h"),
    (RuleKind.TYPICAL_P, "typical_p"),
    (RuleKind.EPSILON, "epsilon_cutoff"),
    (RuleKind.ETA, "eta_cutoff"),
)


def find_eos_tokens(settings: GenerationSettings, eos_token_ids: frozenset[int]) -> Collection[int]:
    """End-of-sequence tokens of a request, whose model has `eos_token_ids`; -1 is none."""
    if settings.ignore_eos:
        return ()
    return eos_token_ids if settings.eos_token_id is None else settings.eos_token_id


def make_rules(
    settings: GenerationSettings,
    num_prompt_tokens: int,
    eos_token_ids: frozenset[int],
    max_tokens: int,
) -> list[Rule]:
    """Makes the rules of a request, in the order in which transformers applies them.

    Args:
        settings: of the request.
        num_prompt_tokens: tokens of its prompt.
        eos_token_ids: of the model.
        max_tokens: maximum number of tokens in a slot, prompt and answer together.

    Raises:
        ValueError: more tokens in their lists than a message holds.
    """
    rules = [
        *_make_biases(settings, eos_token_ids),
        *_make_length_rules(settings, num_prompt_tokens, eos_token_ids, max_tokens),
    ]
    if settings.no_repeat_ngram_size:
        rules.append(Rule(RuleKind.NO_REPEAT, settings.no_repeat_ngram_size))
    if settings.remove_invalid_values:
        rules.append(Rule(RuleKind.REMOVE_INVALID))
    if settings.suppress_tokens:
        rules.append(Rule(RuleKind.SUPPRESS, token_ids=tuple(settings.suppress_tokens)))
    if settings.sampling:
        for kind, name in _SAMPLING_RULES:
            if value := getattr(settings, name):
                rules.append(Rule(kind, value=value))
    if (num_words := count_words(rules)) > MAX_RULE_WORDS:
        raise ValueError(
            "generate: suppress_tokens, bad_words_ids, sequence_bias and the like must hold at "
            f"most {MAX_RULE_WORDS} numbers together, got {num_words}; shorten them"
        )
    return sorted(rules, key=lambda rule: rule.kind)


def _make_biases(settings: GenerationSettings, eos_token_ids: frozenset[int]) -> Iterator[Rule]:
    """Biases of sequences; a bad word is a bias of minus infinity, unless it is an end token."""
    eos = find_eos_tokens(settings, eos_token_ids)
    biases = {tuple(token_ids): bias for token_ids, bias in settings.sequence_bias}
    for word in settings.bad_words_ids:
        if len(word) > 1 or word[0] not in eos:
            biases[tuple(word)] = -math.inf
    for token_ids, bias in biases.items():
        yield Rule(RuleKind.BIAS, value=float(bias), token_ids=token_ids)


def _make_length_rules(
    settings: GenerationSettings,
    num_prompt_tokens: int,
    eos_token_ids: frozenset[int],
    max_tokens: int,
) -> Iterator[Rule]:
    """Rules that depend on the position, which is absolute."""
    eos = {token_id for token_id in find_eos_tokens(settings, eos_token_ids) if token_id >= 0}
    ends = tuple(sorted(eos | set(settings.stop_token_ids)))
    least = settings.min_length or 0
    if settings.min_new_tokens is not None:
        least = num_prompt_tokens + settings.min_new_tokens
    if ends and least > num_prompt_tokens:
        yield Rule(RuleKind.MIN_LENGTH, least, token_ids=ends)
    first = settings.forced_bos_token_id
    if first is not None and num_prompt_tokens == 1:
        yield Rule(RuleKind.FORCED_FIRST, token_ids=(first,))
    if settings.forced_eos_token_id:
        last = min(max_tokens, num_prompt_tokens + settings.count_new_tokens(num_prompt_tokens))
        yield Rule(RuleKind.FORCED_LAST, last, token_ids=tuple(settings.forced_eos_token_id))
    if settings.exponential_decay_length_penalty is not None and eos:
        start, factor = settings.exponential_decay_length_penalty
        yield Rule(
            RuleKind.DECAY, start + num_prompt_tokens, float(factor), token_ids=tuple(sorted(eos))
        )
    if settings.begin_suppress_tokens:
        begin = num_prompt_tokens + (num_prompt_tokens == 1 and first is not None)
        yield Rule(RuleKind.SUPPRESS_FIRST, begin, token_ids=tuple(settings.begin_suppress_tokens))
