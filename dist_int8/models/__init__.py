"""Models: one decoder block described by data, and the families that describe it."""

from dist_int8.int8.attention import decodes_on_gpu, key_cache_shape
from dist_int8.int8.kv import Cache, Int8KV
from dist_int8.models.block import DecoderBlock
from dist_int8.models.config import describe, ignored_tensors, load_config, tensor_sources
from dist_int8.models.decoder import DecoderStage
from dist_int8.models.linear_names import resolve_skip
from dist_int8.models.spec import BlockSpec, ModelSpec, RotarySpec
from dist_int8.models.stage_slice import StageSlice
from dist_int8.models.token_batch import TokenBatch

__all__ = [
    "BlockSpec",
    "Cache",
    "DecoderBlock",
    "DecoderStage",
    "Int8KV",
    "ModelSpec",
    "RotarySpec",
    "StageSlice",
    "TokenBatch",
    "decodes_on_gpu",
    "describe",
    "ignored_tensors",
    "key_cache_shape",
    "load_config",
    "resolve_skip",
    "tensor_sources",
]
