"""How the decoders of `tokenizers` join tokens to text, one token at a time.

A decoder of `tokenizers` sees all tokens of a text at once, and what it does with one may depend on
those that follow: bytes wait for the rest of their character, a run of byte tokens for its end. The
steps here take tokens as they come, give out what no later token can change, and hold the rest.
Joined, what they give out is what the decoder makes of all tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from copy import copy
from typing import Any, Protocol

from tokenizers import Tokenizer, decoders

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# transformers' `clean_up_tokenization`, and what the WordPiece decoder does with each word.
CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_CLEANED_WORDS = (*CLEANED[:7], (" do not", " don't"), *CLEANED[7:])


class Step(Protocol):
    """One component of a decoder."""

    @property
    def held(self) -> str | bytes | None:
        """What later pieces may still change."""

    def feed(self, pieces: list[str]) -> list[str]:
        """Takes pieces and returns those that are certain."""

    def rest(self) -> list[str]:
        """Returns what is held, as it is if nothing follows; changes nothing."""


class Each:
    """Changes every piece by itself.

    Args:
        change: the change.
        first: the change of the very first piece, if it differs.
    """

    def __init__(
        self, change: Callable[[str], str], first: Callable[[str], str] | None = None
    ) -> None:
        self.change, self.first = change, first
        self.held = ""

    def feed(self, pieces: list[str]) -> list[str]:
        if self.first is None or not pieces:
            return [self.change(piece) for piece in pieces]
        begin = self.first(pieces[0])
        self.first = None
        return [begin, *(self.change(piece) for piece in pieces[1:])]

    def rest(self) -> list[str]:
        return []


class Bytes:
    """Byte-level tokens: each character stands for a byte; bytes form characters."""

    def __init__(self, to_byte: dict[str, int]) -> None:
        self.to_byte = to_byte
        self.held = b""

    def feed(self, pieces: list[str]) -> list[str]:
        made = []
        for piece in pieces:
            try:
                new = bytes([self.to_byte[character] for character in piece])
            except KeyError:  # an added token is written as it is
                new = piece.encode()
            text, used = codecs.utf_8_decode(self.held + new, "replace", False)
            self.held = (self.held + new)[used:]
            made.append(text)
        return made

    def rest(self) -> list[str]:
        return [self.held.decode(errors="replace")] if self.held else []


class ByteRuns:
    """Tokens such as <0xE6>: a whole run of them is text, or if it is not, all are replaced.

    Only the end of a run decides, so that all of it is held.
    """

    def __init__(self) -> None:
        self.held = b""

    def feed(self, pieces: list[str]) -> list[str]:
        made = []
        for piece in pieces:
            if len(piece) == 6 and (byte := _BYTE_TOKEN.fullmatch(piece)):
                self.held += bytes([int(byte[1], 16)])
            else:
                if self.held:
                    made += self.rest()
                    self.held = b""
                made.append(piece)
        return made

    def rest(self) -> list[str]:
        try:
            return [self.held.decode()] if self.held else []
        except UnicodeDecodeError:
            return [REPLACEMENT] * len(self.held)


class WordEnds:
    """Pieces whose suffix is a space, but for the last one."""

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix
        self.held: str | None = None

    def feed(self, pieces: list[str]) -> list[str]:
        made = []
        for piece in pieces:
            if self.held is not None:
                made.append(self.held.replace(self.suffix, " "))
            self.held = piece
        return made

    def rest(self) -> list[str]:
        return [] if self.held is None else [self.held.replace(self.suffix, "")]


class Edges:
    """Strips up to `start` and `stop` times a character from the two ends of the whole text."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self.content, self.left, self.stop = content, start, stop
        self.held = ""

    def feed(self, pieces: list[str]) -> list[str]:
        text = self.held + "".join(pieces)
        while self.left and text:
            if not text.startswith(self.content):
                self.left = 0
            else:
                text, self.left = text[1:], self.left - 1
        bare = text.rstrip(self.content) if self.stop else text
        certain = max(len(bare), len(text) - self.stop)
        self.held = text[certain:]
        return [text[:certain]]

    def rest(self) -> list[str]:
        return []


class Swap:
    """Replaces a string in the whole text, as `str.replace` does."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new
        self.held = ""

    def feed(self, pieces: list[str]) -> list[str]:
        parts = (self.held + "".join(pieces)).split(self.old)
        last = parts[-1]
        begun = measure_begun(last, self.old)
        self.held = last[len(last) - begun :]
        parts[-1] = last[: len(last) - begun]
        return [self.new.join(parts)]

    def rest(self) -> list[str]:
        return [self.held]


def measure_begun(text: str, wanted: str) -> int:
    """Length of the longest end of `text` that begins `wanted` and is shorter than it."""
    for length in range(min(len(wanted) - 1, len(text)), 0, -1):
        if wanted.startswith(text[-length:]):
            return length
    return 0


class Spaced:
    """Joins with spaces: what `tokenizers` does without a decoder."""

    def __init__(self) -> None:
        self.begun = False
        self.held = ""

    def feed(self, pieces: list[str]) -> list[str]:
        made = [f" {piece}" if self.begun or i else piece for i, piece in enumerate(pieces)]
        self.begun = self.begun or bool(pieces)
        return made

    def rest(self) -> list[str]:
        return []


def finish(steps: list[Step]) -> str:
    """The text that the steps hold, if nothing follows; changes nothing."""
    pieces: list[str] = []
    if not any(step.held for step in steps):
        return ""
    for step in map(copy, steps):
        pieces = step.feed(pieces) + step.rest()
    return "".join(pieces)


def make_steps(tokenizer: Tokenizer, cleans_up: bool) -> list[Step] | None:
    """Makes the steps of a tokenizer's decoder; None for a decoder that is not known here.

    Args:
        tokenizer: of the library `tokenizers`.
        cleans_up: whether transformers' cleaning of spaces follows.
    """
    steps: list[Step] = []
    if tokenizer.decoder is None:
        steps.append(Spaced())
    else:
        fused = False  # whether all that came before is one piece, so that a step sees it whole
        for component in _list_components(json.loads(tokenizer.decoder.__getstate__())):
            step = (_make_whole if fused else _make_step)(component)
            if step is None:
                return None
            fused = fused or component["type"] in ("ByteLevel", "Fuse")
            steps += step
    if cleans_up:
        steps += [Swap(old, new) for old, new in CLEANED]
    return steps


def _list_components(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] == "Sequence":
        return [part for inner in state["decoders"] for part in _list_components(inner)]
    return [state]


def _make_step(component: dict[str, Any]) -> list[Step] | None:
    """The step of a component that sees the tokens one by one."""
    match component:
        case {"type": "ByteLevel"}:
            return [Bytes(_list_bytes())]
        case {"type": "ByteFallback"}:
            return [ByteRuns()]
        case {"type": "Fuse"}:
            return []
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return [Each(lambda piece: piece.replace(old, new))]
        case {"type": "Strip", "content": str(content), "start": int(start), "stop": int(stop)}:
            strip = decoders.Strip(content, start, stop)
            return [Each(lambda piece: strip.decode([piece]) if piece else "")]
        case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": str(scheme)}:
            first = None if scheme == "never" else (lambda piece: piece.replace(mark, ""))
            return [Each(lambda piece: piece.replace(mark, " "), first)]
        case {"type": "WordPiece", "prefix": str(prefix), "cleanup": bool(cleanup)}:
            return [_make_words(prefix, _CLEANED_WORDS if cleanup else ())]
        case {"type": "BPEDecoder", "suffix": str(suffix)} if suffix:
            return [WordEnds(suffix)]
    return None


def _make_whole(component: dict[str, Any]) -> list[Step] | None:
    """The step of a component that sees the whole text as one piece."""
    match component:
        case {"type": "Fuse"}:
            return []
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return [Swap(old, new)]
        case {"type": "Strip", "content": str(content), "start": int(start), "stop": int(stop)}:
            return [Edges(content, start, stop)]
    return None


def _make_words(prefix: str, cleaned: tuple[tuple[str, str], ...]) -> Each:
    """Pieces that begin a word unless they begin with `prefix`."""

    def clean(word: str) -> str:
        for old, new in cleaned:
            word = word.replace(old, new)
        return word

    def join(piece: str) -> str:
        return clean(piece.replace(prefix, "", 1) if piece.startswith(prefix) else f" {piece}")

    return Each(join, clean)


def _list_bytes() -> dict[str, int]:
    """The byte of every character of byte-level tokens, as in GPT-2's vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    codes = {chr(byte): byte for byte in shown}
    return codes | {chr(256 + i): byte for i, byte in enumerate(hidden)}
