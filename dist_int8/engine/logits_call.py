"""One call of `Engine.logits`: the pieces that are submitted, and the logits that arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dist_int8.engine.pieces import SequencePiece, pack


class LogitsCall:
    """The sequences of one call. Other calls may run in between, and take its slots away.

    It then goes on with the sequence that it was in: the tokens submitted before are prefilled
    again, and only the logits of the others are handed out.

    Args:
        sequences: token ids.

    Attributes:
        slots: KV slots that were lent to it.
        outbox: (sequence, first position, logits fp32 [tokens, V]) that its caller has not taken.
        closed: the caller has seen enough.
    """

    def __init__(self, sequences: list[list[int]]) -> None:
        self.slots: list[int] = []
        self.outbox: deque[tuple[int, int, Tensor]] = deque()
        self.closed = False
        self._sequences = sequences
        self._groups: Iterator[list[SequencePiece]] = iter(())
        self._submitted = (0, 0)  # sequence and position of what is to be submitted next
        self._arrived = (0, 0)  # and of what comes next
        self._size = 0

    @property
    def has_more(self) -> bool:
        """Whether there is something left to submit."""
        return not self.closed and self._submitted[0] < len(self._sequences)

    @property
    def ended(self) -> bool:
        """Whether the last piece has arrived."""
        return self.closed or self._arrived[0] == len(self._sequences)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self._sequences))

    def begin(self, slots: list[int], size: int) -> None:
        """Takes slots, and at most `size` tokens per micro-batch from now on."""
        self.slots, self._size = slots, size
        first = self._submitted[0]
        self._groups = pack(self._sequences, size, len(slots), first)

    def replay(self) -> None:
        """Submits again what was under way, after a recovery."""
        self._submitted = self._arrived
        if self.slots:
            self.begin(self.slots, self._size)

    def next_pieces(self) -> list[SequencePiece]:
        """Returns what to submit next. There must be something left, and slots."""
        return next(self._groups)

    def note_submitted(self, pieces: list[SequencePiece]) -> LogitsTurn:
        """Notes that these pieces are under way."""
        sequence, position = self._submitted
        skipped = [
            min(len(piece.token_ids), position - piece.start) if piece.sequence == sequence else 0
            for piece in pieces
        ]
        self._submitted = max(self._submitted, self._after(pieces[-1]))
        return LogitsTurn(self, pieces, [max(0, count) for count in skipped])

    def take(self, pieces: list[SequencePiece], skipped: list[int], values: Tensor) -> None:
        """Takes logits fp32 [T, V] of pieces, but for the first ones of each."""
        if self.closed:
            return
        parts = values.split([len(piece.token_ids) for piece in pieces])
        for piece, skip, logits in zip(pieces, skipped, parts, strict=True):
            if skip < len(logits):
                self.outbox.append((piece.sequence, piece.start + skip, logits[skip:]))
        self._arrived = max(self._arrived, self._after(pieces[-1]))

    def _after(self, piece: SequencePiece) -> tuple[int, int]:
        end = piece.start + len(piece.token_ids)
        is_last = end == len(self._sequences[piece.sequence])
        return (piece.sequence + 1, 0) if is_last else (piece.sequence, end)


@dataclass(frozen=True)
class LogitsTurn:
    """A micro-batch of a call that is under way.

    Attributes:
        call: the call.
        pieces: of its sequences.
        skipped: of each piece, the number of tokens whose logits were asked for before.
    """

    call: LogitsCall
    pieces: list[SequencePiece]
    skipped: list[int]

    def take(self, values: Tensor) -> None:
        """Takes logits fp32 [T, V]."""
        self.call.take(self.pieces, self.skipped, values)
