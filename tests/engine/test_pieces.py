"""Sequences cut into pieces: every token once, in order, within the limits."""

import pytest
import torch

from dist_int8.engine.pieces import form_micro_batch, pack
from dist_int8.pipeline.microbatch import Kind

SEQUENCES = [[1, 2, 3, 4, 5], [6], [7, 8, 9], []]


@pytest.mark.parametrize("size", [1, 2, 4, 100])
@pytest.mark.parametrize("num_slots", [1, 2, 8])
def test_every_token_comes_once_in_order(size, num_slots):
    groups = list(pack(SEQUENCES, size, num_slots))
    rebuilt = [[] for _ in SEQUENCES]
    for pieces in groups:
        assert 0 < len(pieces) <= num_slots
        assert sum(len(piece.token_ids) for piece in pieces) <= size
        for piece in pieces:
            assert piece.start == len(rebuilt[piece.sequence])
            rebuilt[piece.sequence] += piece.token_ids
    assert rebuilt == SEQUENCES


def test_a_micro_batch_asks_for_the_logits_of_all_its_tokens():
    (pieces,) = pack(SEQUENCES, 100, 8)
    micro_batch = form_micro_batch(pieces, slots=[4, 2], step=9)
    assert (micro_batch.kind, micro_batch.step) == (Kind.LOGITS, 9)
    assert micro_batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert micro_batch.segments.tolist() == [[4, 0, 5], [2, 0, 1], [4, 0, 3]]
    assert micro_batch.segments.dtype == torch.int32 and not micro_batch.emits.any()
