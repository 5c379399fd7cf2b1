"""Measures how fast one call is."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dist_int8.engine.requests import Request


class Speed:
    """Measures tokens per second of one call's requests, prefill and decode apart."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.num_prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        self.num_tokens = 0
        self._without_token = {request.index for request in requests}
        self._num_early = 0  # tokens that arrived until every prompt had its first one
        self._started = self._prefilled = self._ended = time.perf_counter()

    def note(self, index: int) -> None:
        """Records that a token of prompt `index` arrived."""
        self._ended = time.perf_counter()
        self.num_tokens += 1
        if self._without_token:
            self._without_token.discard(index)
            self._prefilled, self._num_early = self._ended, self.num_tokens

    @property
    def seconds(self) -> float:
        """Seconds from the start of the call to the last token."""
        return self._ended - self._started

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second until the last prompt had its first token."""
        return _rate(self.num_prompt_tokens, self._prefilled - self._started)

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens per second after the last prompt had its first token."""
        return _rate(self.num_tokens - self._num_early, self._ended - self._prefilled)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
