"""Cuts token sequences into pieces, for micro-batches whose logits are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dist_int8.pipeline.microbatch import Kind, MicroBatch


@dataclass(frozen=True)
class SequencePiece:
    """Consecutive tokens of one sequence.

    Attributes:
        sequence: index of the sequence.
        start: position of the first token.
        token_ids: the tokens.
    """

    sequence: int
    start: int
    token_ids: list[int]


def pack(
    sequences: list[list[int]], size: int, num_slots: int, first: int = 0
) -> Iterator[list[SequencePiece]]:
    """Cuts the sequences, in order, and groups the pieces.

    Args:
        sequences: token ids.
        size: maximum number of tokens in a group.
        num_slots: maximum number of pieces in a group.
        first: index of the sequence to begin with.
    """
    pieces: list[SequencePiece] = []
    room = size
    for index in range(first, len(sequences)):
        token_ids, start = sequences[index], 0
        while start < len(token_ids):
            if not room or len(pieces) == num_slots:
                yield pieces
                pieces, room = [], size
            piece = SequencePiece(index, start, token_ids[start : start + room])
            pieces.append(piece)
            start, room = start + len(piece.token_ids), room - len(piece.token_ids)
    if pieces:
        yield pieces


def form_micro_batch(pieces: list[SequencePiece], slots: list[int], step: int) -> MicroBatch:
    """Forms the micro-batch that asks for the logits of every token of the pieces.

    Args:
        pieces: pieces of different sequences.
        slots: KV slots; sequence i uses slot i modulo their number.
        step: number of the micro-batch.
    """
    segments = [
        (slots[piece.sequence % len(slots)], piece.start, len(piece.token_ids)) for piece in pieces
    ]
    return MicroBatch(
        Kind.LOGITS,
        step=step,
        token_ids=torch.tensor([token for piece in pieces for token in piece.token_ids]),
        segments=torch.tensor(segments, dtype=torch.int32),
        emits=torch.zeros(len(segments), dtype=torch.int64),
    )
