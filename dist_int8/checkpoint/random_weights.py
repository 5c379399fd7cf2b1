"""A stage with made-up weights of the right shapes: a rehearsal without the download."""

import zlib

import torch
from torch import nn

from dist_int8.checkpoint.stage_format import StageFormat
from dist_int8.checkpoint.tied_head import EMBEDDING, HEAD, has_same_format, share_embedding
from dist_int8.int8.embedding import Int8Embedding
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.config import tensor_sources
from dist_int8.models.decoder import DecoderStage
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice

# As most models are initialised. int8 values are uniform, with this standard deviation.
_STD = 0.02
_INT8_STD = (127 * 128 / 3) ** 0.5


@torch.no_grad()
def make_random_stage(
    spec: ModelSpec,
    stage_slice: StageSlice,
    stage_format: StageFormat,
    *,
    device: torch.device | str = "cpu",
    vocab_dtype: torch.dtype = torch.float32,
    num_hot_columns: int = 0,
    down_hot_columns: int | None = None,
) -> DecoderStage:
    """Makes the stage that `load_stage` builds, with random weights and without a checkpoint.

    The weights are made on `device` itself: nothing passes through host memory. A parameter is the
    same whichever stage it is in, on the same kind of device: the seed is its name.

    Args:
        spec: `models.describe` of a config.
        stage_slice: the part of the model to make.
        stage_format: how to hold it.
        device: where the stage lives.
        vocab_dtype: of embedding and head, where they are not int8; and of hot weights.
        num_hot_columns: of the int8 linears of the blocks and of an int8 head, the first ones.
        down_hot_columns: of each `down`; None: as many.
    """
    stage = stage_format.make_empty_stage(spec, stage_slice)
    in_down = num_hot_columns if down_hot_columns is None else down_hot_columns
    counts = num_hot_columns, in_down
    filler = _RandomFiller(stage, torch.device(device), vocab_dtype, counts)
    for target, source in tensor_sources(spec, stage_slice).items():
        shape = (sum(piece[0] for piece in source.shapes), *source.shapes[0][1:])
        filler.fill(target, shape)
    stage.move_tables(device)
    return stage.eval()


class _RandomFiller:
    def __init__(
        self,
        stage: DecoderStage,
        device: torch.device,
        vocab_dtype: torch.dtype,
        counts: tuple[int, int],
    ) -> None:
        self._stage = stage
        self._device = device
        self._vocab_dtype = vocab_dtype
        self._num_hot_columns, self._down_hot_columns = counts

    def fill(self, target: str, shape: tuple[int, ...]) -> None:
        stage = self._stage
        path, _, kind = target.rpartition(".")
        module = stage.get_submodule(path)
        tied = target == HEAD and stage.spec.tied_head
        has_own = isinstance(module, Int8Linear) and (self._num_hot_columns or module.rotation)
        if tied and stage.slice.first and has_same_format(stage) and not has_own:
            share_embedding(stage)
            return
        name = EMBEDDING if tied else target
        seed = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        if not isinstance(module, Int8Linear | Int8Embedding):
            self._fill_floating(target, shape, seed)
        elif kind == "weight":
            has_hot = path.startswith("blocks.") or target == HEAD
            count = self._num_hot_columns
            count = self._down_hot_columns if path.endswith(".down") else count
            num_hot = min(count, shape[1]) if has_hot else 0
            self._fill_int8(module, shape, num_hot, seed)
        else:
            module.bias = torch.zeros(shape, dtype=stage.dtype, device=self._device)

    def _fill_int8(
        self,
        module: Int8Linear | Int8Embedding,
        shape: tuple[int, ...],
        num_hot: int,
        seed: torch.Generator,
    ) -> None:
        weight = torch.empty(shape, dtype=torch.int8, device=self._device)
        module.weight_int8 = weight.random_(-127, 128, generator=seed)
        module.col_scale = torch.full(shape[:1], _STD / _INT8_STD, device=self._device)
        if num_hot:
            columns = torch.arange(num_hot, dtype=torch.int32, device=self._device)
            hot = torch.empty((shape[0], num_hot), dtype=self._vocab_dtype, device=self._device)
            module.hot_columns = columns
            module.hot_weight = hot.normal_(std=_STD, generator=seed)
        if isinstance(module, Int8Linear):
            module.pack_()

    def _fill_floating(self, target: str, shape: tuple[int, ...], seed: torch.Generator) -> None:
        path, _, kind = target.rpartition(".")
        dtype = self._vocab_dtype if path in ("embedding", "lm_head") else self._stage.dtype
        if len(shape) == 2:
            filled = torch.empty(shape, dtype=dtype, device=self._device)
            filled.normal_(std=_STD, generator=seed)
        else:  # of a norm, or a bias
            filled = torch.full(shape, float(kind == "weight"), dtype=dtype, device=self._device)
        parameter = nn.Parameter(filled, requires_grad=False)
        setattr(self._stage.get_submodule(path), kind, parameter)
