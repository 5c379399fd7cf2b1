"""A stage with made-up weights of the right shapes: a rehearsal without the download."""

import zlib

import torch
from torch import nn

from dist_int8.int8.embedding import Int8Embedding
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.config import tensor_sources
from dist_int8.models.decoder import DecoderStage

EMBEDDING, HEAD = "embedding.weight", "lm_head.weight"  # parameters that a tied head makes one
# As most models are initialised. int8 values are uniform, with this standard deviation.
_STD = 0.02
_INT8_STD = (127 * 128 / 3) ** 0.5


@torch.no_grad()
def fill_with_random_weights(
    stage: DecoderStage,
    device: torch.device | str,
    vocab_dtype: torch.dtype,
    num_hot_columns: int = 0,
) -> DecoderStage:
    """Fill a stage on the meta device, its `Int8Linear` layers included, on `device` itself.

    Nothing passes through host memory. A parameter is the same whichever stage it is in, on the
    same kind of device: the seed is its name.

    Args:
        stage: `DecoderStage.empty`, converted or not.
        device: where it lives.
        vocab_dtype: of embedding and head, where they are not int8; and of hot weights.
        num_hot_columns: of the int8 linears of the blocks and of an int8 head, the first ones.
    """
    device = torch.device(device)
    spec = stage.spec
    sources = tensor_sources(spec, stage.block_range, first=stage.first, last=stage.last)
    for target, source in sources.items():
        path, _, kind = target.rpartition(".")
        module = stage.get_submodule(path)
        shape = (sum(piece[0] for piece in source.shapes), *source.shapes[0][1:])
        tied = target == HEAD and spec.tied_head
        name = EMBEDDING if tied else target
        own = isinstance(module, Int8Linear) and num_hot_columns > 0
        if tied and stage.first and has_same_format(stage) and not own:
            share_embedding(stage)
            continue
        seed = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        if isinstance(module, Int8Linear | Int8Embedding):
            if kind == "weight":
                weight = torch.empty(shape, dtype=torch.int8, device=device)
                module.weight_int8 = weight.random_(-127, 128, generator=seed)
                module.col_scale = torch.full(shape[:1], _STD / _INT8_STD, device=device)
                has_hot = path.startswith("blocks.") or target == HEAD
                num_hot = min(num_hot_columns, shape[1]) if has_hot else 0
                if num_hot:
                    columns = torch.arange(num_hot, dtype=torch.int32, device=device)
                    hot = torch.empty((shape[0], num_hot), dtype=vocab_dtype, device=device)
                    module.hot_columns = columns
                    module.hot_weight = hot.normal_(std=_STD, generator=seed)
            else:
                module.bias = torch.zeros(shape, dtype=stage.dtype, device=device)
            continue
        dtype = vocab_dtype if path in ("embedding", "lm_head") else stage.dtype
        if len(shape) == 2:
            filled = torch.empty(shape, dtype=dtype, device=device)
            filled.normal_(std=_STD, generator=seed)
        else:  # of a norm, or a bias
            filled = torch.full(shape, float(kind == "weight"), dtype=dtype, device=device)
        setattr(module, kind, nn.Parameter(filled, requires_grad=False))
    stage.move_tables(device)
    return stage.eval()


def has_same_format(stage: DecoderStage) -> bool:
    """Whether head and embedding of a stage with both are in int8, or neither."""
    return isinstance(stage.lm_head, Int8Linear) == isinstance(stage.embedding, Int8Embedding)


def share_embedding(stage: DecoderStage) -> None:
    """Makes the table of the embedding that of the head too."""
    if isinstance(stage.embedding, Int8Embedding):
        stage.lm_head.weight_int8 = stage.embedding.weight_int8
        stage.lm_head.col_scale = stage.embedding.col_scale
    else:
        stage.lm_head.weight = stage.embedding.weight
