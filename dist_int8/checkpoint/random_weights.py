"""A stage with made-up weights of the right shapes: a rehearsal without the download."""

import zlib

import torch
from torch import nn

from dist_int8.int8.linear import Int8Linear
from dist_int8.models.config import tensor_sources
from dist_int8.models.decoder import DecoderStage

# As most models are initialised. int8 values are uniform, with this standard deviation.
_STD = 0.02
_INT8_STD = (127 * 128 / 3) ** 0.5


@torch.no_grad()
def fill_with_random_weights(
    stage: DecoderStage, device: torch.device | str, vocab_dtype: torch.dtype
) -> DecoderStage:
    """Fill a stage on the meta device, its `Int8Linear` layers included, on `device` itself.

    Nothing passes through host memory. A parameter is the same whichever stage it is in, on the
    same kind of device: the seed is its name.

    Args:
        stage: `DecoderStage.empty`, converted or not.
        device: where it lives.
        vocab_dtype: of embedding and head, if the head is not int8.
    """
    device = torch.device(device)
    spec = stage.spec
    sources = tensor_sources(spec, stage.block_range, first=stage.first, last=stage.last)
    for target, source in sources.items():
        path, _, kind = target.rpartition(".")
        module = stage.get_submodule(path)
        shape = (sum(piece[0] for piece in source.shapes), *source.shapes[0][1:])
        tied = target == "lm_head.weight" and spec.tied_head
        name = "embedding.weight" if tied else target
        seed = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        if isinstance(module, Int8Linear):
            if kind == "weight":
                weight = torch.empty(shape, dtype=torch.int8, device=device)
                module.weight_int8 = weight.random_(-127, 128, generator=seed)
                module.col_scale = torch.full(shape[:1], _STD / _INT8_STD, device=device)
            else:
                module.bias = torch.zeros(shape, dtype=stage.dtype, device=device)
            continue
        if tied and stage.first:
            module.weight = stage.embedding.weight
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
