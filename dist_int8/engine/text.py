"""Turns token ids into text while they arrive: what is certain, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dist_int8.engine.decoder_steps import measure_begun
from dist_int8.engine.detokenizer import Detokenizer, list_special_ids, make_detokenizer


class _Piece(NamedTuple):
    """What one token added: to the text that stop strings are looked for in, and to the answer."""

    token: int  # its place in the answer
    shown: str  # with special tokens
    text: str  # without


class TextStream:
    """The text of one answer, growing: `tokenizer.decode` of its tokens, without special tokens.

    `push` returns what became certain: what no later token changes, and what cannot begin a stop
    string. Stop strings are looked for in the text with special tokens, so that one of them, such
    as "<|im_end|>", can be a stop string.

    Args:
        tokenizer: a tokenizer of transformers, or None for no text.
        stop: strings that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        self.text = ""  # certain so far
        self._token_ids: list[int] = []
        self._decoder: Detokenizer | None = None
        if tokenizer is not None:
            self._decoder = make_detokenizer(tokenizer)
        # The rest is for stop strings.
        self._special = list_special_ids(tokenizer) if tokenizer is not None and stop else ()
        self._shown: Detokenizer | None = None  # with special tokens, from the first one on
        self._num_shown = 0  # characters of that text so far, those of `_held` included
        self._held: list[_Piece] = []  # perhaps the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that became certain."""
        if self._decoder is None or self.stopped:
            return ""
        if not self.stop:
            piece = self._decoder.push(token_id)
            self.text += piece
            return piece
        if self._shown is None and token_id in self._special:
            self._shown = self._decoder.with_special_tokens()
        self._token_ids.append(token_id)
        piece = self._decoder.push(token_id)
        shown = piece if self._shown is None else self._shown.push(token_id)
        self._hold(shown, piece)
        return self._release()

    def finish(self) -> str:
        """Ends the answer and returns the text that was held back."""
        if self._decoder is None or self.stopped:
            return ""
        certain = "".join(piece.text for piece in self._held) + self._decoder.finish()
        self._held = []
        self.text += certain
        return certain

    def _hold(self, shown: str, piece: str) -> None:
        if shown or piece:
            self._held.append(_Piece(len(self._token_ids) - 1, shown, piece))
            self._num_shown += len(shown)

    def _release(self) -> str:
        """Returns what cannot be part of a stop string, or all before one, which ends the text."""
        assert self._decoder is not None
        candidate = "".join(piece.shown for piece in self._held)
        rest = (self._shown or self._decoder).rest()  # nothing follows if a stop string ends here
        found = [place for stop in self.stop if (place := (candidate + rest).find(stop)) >= 0]
        if found:
            return self._end(min(found) - len(candidate))
        keep = max(measure_begun(candidate, stop) for stop in self.stop)
        certain = ""
        while self._held and keep < len(candidate):
            token, shown, text = self._held.pop(0)
            after = len(candidate) - len(shown)  # of the characters that follow this piece
            candidate = candidate[len(shown) :]
            if after < keep:  # a stop string may begin within it
                kept = keep - after
                cut = max(0, len(text) - kept)
                certain += text[:cut]
                self._held.insert(0, _Piece(token, shown[len(shown) - kept :], text[cut:]))
                break
            certain += text
        self.text += certain
        return certain

    def _end(self, place: int) -> str:
        """Ends the text before a stop string that begins `place` after the end of `_held`."""
        assert self._decoder is not None
        self.stopped = True
        if self._shown is None:
            whole = self.text + "".join(piece.text for piece in self._held) + self._decoder.rest()
            whole = whole[: self._num_shown + place]
        else:
            whole = self._cut_at_special(place)
        self._held = []
        certain = whole[len(self.text) :] if whole.startswith(self.text) else ""
        self.text += certain
        return certain

    def _cut_at_special(self, place: int) -> str:
        """The text before a stop string, where special tokens are among the tokens."""
        index = len(self._token_ids) - 1
        after = 0
        for piece in reversed(self._held):
            if -place <= after:
                break
            index = piece.token
            after += len(piece.shown)
        decode = self.tokenizer.decode
        shown = len(decode(self._token_ids[: index + 1], skip_special_tokens=False))
        past = shown - (self._num_shown + place)  # characters of the stop string up to this token
        if self._token_ids[index] in self._special:
            past -= shown - len(decode(self._token_ids[:index], skip_special_tokens=False))
        text = decode(self._token_ids[: index + 1], skip_special_tokens=True)
        return text[: len(text) - max(0, past)]
