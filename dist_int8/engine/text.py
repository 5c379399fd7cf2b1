"""Turns token ids into text while they arrive: whole characters, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "�"  # what a tokenizer shows for a character whose bytes have not all arrived
CONTEXT_TOKENS = 6  # decoded again with each new token, for tokenizers that join words by context


class TextStream:
    """The text of one answer, growing.

    `push` returns what became certain: characters whose bytes are complete and which cannot begin a
    stop string.

    Args:
        tokenizer: a tokenizer of transformers, or None for no text.
        stop: strings that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        self.text = ""  # certain so far
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._token_ids: list[int] = []
        self._begin = 0  # first token decoded again
        self._done = 0  # tokens whose text has been taken

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that became certain."""
        self._token_ids.append(token_id)
        before = self._decode(self._token_ids[self._begin : self._done])
        after = self._decode(self._token_ids[self._begin :])
        if after.endswith(UNFINISHED) or len(after) <= len(before):
            return ""
        self._done = len(self._token_ids)
        self._begin = max(self._begin, self._done - CONTEXT_TOKENS)
        return self._take(after[len(before) :], final=False)

    def finish(self) -> str:
        """Ends the answer and returns the text that was held back."""
        before = self._decode(self._token_ids[self._begin : self._done])
        after = self._decode(self._token_ids[self._begin :])
        self._done = len(self._token_ids)
        return self._take(after[len(before) :], final=True)

    def _decode(self, token_ids: list[int]) -> str:
        if self.tokenizer is None or not token_ids:
            return ""
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _take(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        candidate = self._held + piece
        found = [candidate.find(stop) for stop in self.stop if stop in candidate]
        if found:
            self.stopped = True
            certain, self._held = candidate[: min(found)], ""
        else:
            keep = 0 if final else self._measure_stop_prefix(candidate)
            certain = candidate[: len(candidate) - keep]
            self._held = candidate[len(candidate) - keep :]
        self.text += certain
        return certain

    def _measure_stop_prefix(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if stop.startswith(text[-length:]):
                    longest = length
                    break
        return longest
