"""A head that shares the embedding's table, where one stage holds both in the same form."""

from functools import partial

import torch

from dist_int8.checkpoint.located import Located
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.int8.embedding import Int8Embedding
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.decoder import DecoderStage

EMBEDDING, HEAD = "embedding.weight", "lm_head.weight"  # parameters that a tied head makes one


def has_same_format(stage: DecoderStage) -> bool:
    """Whether head and embedding of a stage with both are in int8, or neither."""
    return isinstance(stage.lm_head, Int8Linear) == isinstance(stage.embedding, Int8Embedding)


def is_shared(stage: DecoderStage, located: dict[str, Located], reader: CheckpointReader) -> bool:
    """Whether head and embedding of a stage with both are one table in memory."""
    if not stage.spec.tied_head or not has_same_format(stage):
        return False
    head, embedding = located[HEAD], located[EMBEDDING]
    if head.is_int8 != embedding.is_int8 or head.hot_columns is not None:
        return False
    if head.rotation != embedding.rotation:
        return False
    # A tied checkpoint may hold the head too; transformers ties them only if they are equal.
    return head.names == embedding.names or (
        len(head.names) == len(embedding.names)
        and all(map(partial(_are_equal, reader), head.names, embedding.names))
    )


def share_embedding(stage: DecoderStage) -> None:
    """Makes the table of the embedding that of the head too."""
    if isinstance(stage.embedding, Int8Embedding):
        head = stage.lm_head
        assert isinstance(head, Int8Linear)
        head.share_weight(stage.embedding.pack_())
        head.rotation = 0  # rows of the table are looked up as they are
    else:
        stage.lm_head.weight = stage.embedding.weight


def _are_equal(reader: CheckpointReader, name: str, other: str) -> bool:
    if reader.dtype(name) != reader.dtype(other):
        return False
    pairs = zip(reader.slices(name), reader.slices(other), strict=True)
    return all(
        torch.equal(rows.view(torch.uint8), other_rows.view(torch.uint8))  # of any dtype
        for (_, rows), (_, other_rows) in pairs
    )
