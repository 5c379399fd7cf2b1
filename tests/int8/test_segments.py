"""Segments of mixed micro-batches: places, ends of prompts, and where the decoding ones end."""

import pytest
import torch

from dist_int8.int8.segments import Segments

MIXED = [(2, 40, 1), (0, 0, 1), (3, 5, 3), (1, 7, 1), (4, 0, 2)]


def test_every_token_has_its_place():
    segments = Segments.of(torch.tensor(MIXED, dtype=torch.int32))
    places = [(2, 40), (0, 0), (3, 5), (3, 6), (3, 7), (1, 7), (4, 0), (4, 1)]
    assert segments.places.tolist() == [[slot, position, 1] for slot, position in places]
    assert segments.rows.tolist() == [list(row) for row in MIXED]


def test_prompts_begin_at_the_first_segment_of_several_tokens():
    segments = Segments.of(torch.tensor(MIXED, dtype=torch.int32))
    assert segments.num_decodes == 2
    assert segments.prompts.rows.tolist() == [list(row) for row in MIXED[2:]]
    assert segments.prompts.query_ends.tolist() == [0, 3, 4, 6]
    assert segments.prompts.key_ends.tolist() == [0, 8, 16, 18]
    assert segments.prompts.query_ends.dtype == torch.int32


@pytest.mark.parametrize(("rows", "num_decodes"), [(MIXED[:2], 2), (MIXED[2:3], 0), ([], 0)])
def test_batches_of_one_kind(rows, num_decodes):
    segments = Segments.of(torch.tensor(rows, dtype=torch.int32).view(-1, 3))
    assert segments.num_decodes == num_decodes
    assert (segments.prompts is None) == (num_decodes == len(rows))


def test_all_parts_lie_in_one_memory():
    """One upload: what another device than the CPU gets is one tensor."""
    segments = Segments.of(torch.tensor(MIXED, dtype=torch.int32), "meta")
    parts = (segments.places, segments.prompts.query_ends, segments.prompts.key_ends)
    assert len({part.untyped_storage()._cdata for part in parts}) == 1
