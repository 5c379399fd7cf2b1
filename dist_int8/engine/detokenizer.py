"""The text of token ids while they arrive: what no later token changes, and what is still held."""

from __future__ import annotations

import logging
import random
from copy import copy
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dist_int8.engine.decoder_steps import REPLACEMENT, Step, finish, make_steps

logger = logging.getLogger(__name__)

# Where nothing is known about a tokenizer: tokens decoded again with each new one, and how many of
# the newest ones are held because those that follow may change them.
_CONTEXT_TOKENS, _HELD_TOKENS = 24, 4
_TRIED_TOKENS = 64  # of the sample that shows whether the steps of a decoder are right


class Detokenizer(Protocol):
    """Joined, what `push` and at last `finish` return is the tokenizer's text of the tokens."""

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that became certain."""

    def rest(self) -> str:
        """Returns the text that is still held, as it is if no token follows; changes nothing."""

    def finish(self) -> str:
        """Returns `rest` of the last token, compared with the text of all tokens if need be."""

    def with_special_tokens(self) -> Detokenizer:
        """Returns a copy that goes on from here and renders special tokens."""


class StepDetokenizer:
    """Text by the steps of a decoder of `tokenizers` (`engine.decoder_steps`).

    Args:
        backend: tokenizer of the library `tokenizers`.
        steps: of its decoder.
        skipped: ids of special tokens, which have no text.
    """

    def __init__(self, backend: Any, steps: list[Step], skipped: frozenset[int]) -> None:
        self.token_of = backend.id_to_token
        self.steps = [copy(step) for step in steps]
        self.skipped = skipped

    def push(self, token_id: int) -> str:
        if token_id in self.skipped:
            return ""
        token = self.token_of(token_id)
        if token is None:  # a row of the embedding without a token
            return ""
        pieces = [token]
        for step in self.steps:
            pieces = step.feed(pieces)
        return "".join(pieces)

    def rest(self) -> str:
        return finish(self.steps)

    def finish(self) -> str:
        return self.rest()

    def with_special_tokens(self) -> Detokenizer:
        made = copy(self)
        made.steps, made.skipped = [copy(step) for step in self.steps], frozenset()
        return made


class WindowDetokenizer:
    """Text of a tokenizer of which only `decode` is known, from a window of its tokens.

    The newest tokens are held. The text is right where a token changes none but its neighbors,
    which is checked at the end: a difference is logged.
    """

    def __init__(self, tokenizer: Any, skips_special_tokens: bool = True) -> None:
        self.decode = partial(tokenizer.decode, skip_special_tokens=skips_special_tokens)
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.begin = 0  # first token decoded again
        self.done = 0  # tokens whose text has been given out
        self.text = ""

    def push(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        end = len(self.token_ids) - _HELD_TOKENS
        if end <= self.done:
            return ""
        before = self.decode(self.token_ids[self.begin : self.done])
        after = self.decode(self.token_ids[self.begin : end])
        if after.endswith(REPLACEMENT) or not after.startswith(before):
            return ""
        self.done = end
        if self.done - self.begin > 2 * _CONTEXT_TOKENS:
            self.begin = self.done - _CONTEXT_TOKENS
        self.text += after[len(before) :]
        return after[len(before) :]

    def rest(self) -> str:
        before = self.decode(self.token_ids[self.begin : self.done])
        return self.decode(self.token_ids[self.begin :])[len(before) :]

    def finish(self) -> str:
        whole = self.decode(self.token_ids)
        if whole.startswith(self.text):
            return whole[len(self.text) :]
        logger.warning(
            "the text of %d tokens differs from %s.decode of all of them",
            len(self.token_ids),
            type(self.tokenizer).__name__,
        )
        return self.rest()

    def with_special_tokens(self) -> Detokenizer:
        made = copy(self)
        made.token_ids = list(self.token_ids)
        made.decode = partial(self.tokenizer.decode, skip_special_tokens=False)
        return made


_Known = tuple[bool, list[Step] | None, frozenset[int]]
_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def make_detokenizer(tokenizer: Any) -> Detokenizer:
    """Makes a detokenizer for a tokenizer of transformers; special tokens have no text."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return WindowDetokenizer(tokenizer)
    backend = tokenizer.backend_tokenizer
    state = bool(tokenizer.clean_up_tokenization_spaces)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        added = backend.get_added_tokens_decoder()
        special = frozenset(index for index, token in added.items() if token.special)
        known = state, _find_steps(tokenizer, special), special
        _KNOWN[tokenizer] = known
    _, steps, special = known
    if steps is None:
        return WindowDetokenizer(tokenizer)
    return StepDetokenizer(backend, steps, special)


def list_special_ids(tokenizer: Any) -> frozenset[int]:
    """Lists the ids of tokens that have no text in an answer."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        make_detokenizer(tokenizer)
        return _KNOWN[tokenizer][2]
    return frozenset(tokenizer.all_special_ids)


def _find_steps(tokenizer: Any, special: frozenset[int]) -> list[Step] | None:
    """The steps of a tokenizer's decoder; None if there are none, or if a sample shows others."""
    kind = type(tokenizer)
    own = any(
        getattr(kind, name) is not getattr(PreTrainedTokenizerFast, name)
        for name in ("decode", "_decode")
    )
    if own or kind.clean_up_tokenization is not PreTrainedTokenizerBase.clean_up_tokenization:
        return None
    backend = tokenizer.backend_tokenizer
    bpe = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    cleans_up = bool(tokenizer.clean_up_tokenization_spaces) and (
        type(backend.model).__name__ != "BPE" or getattr(tokenizer, bpe, False)
    )
    steps = make_steps(backend, cleans_up)
    if steps is None:
        return None
    draw = random.Random(0)
    for _ in range(4):
        sample = [draw.randrange(max(1, len(tokenizer))) for _ in range(_TRIED_TOKENS)]
        tried = StepDetokenizer(backend, steps, special)
        text = "".join(map(tried.push, sample)) + tried.rest()
        if text != tokenizer.decode(sample, skip_special_tokens=True):
            return None
    return steps
