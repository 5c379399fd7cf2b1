"""The two kinds of KV cache: in the dtype of the model, or in int8 with a scale per token and head.

Keys are rounded to int8 after the rotary embedding, and a token attends to its own rounded key too,
so what it sees does not depend on how a prompt was split into chunks.
"""

from typing import NamedTuple

from torch import Tensor


class Int8KV(NamedTuple):
    """The keys or the values of S slots of L tokens, of one block."""

    values: Tensor  # int8, keys of `attention.key_cache_shape`, values [S, KV, L, D]
    scale: Tensor  # fp32 [S, KV, L]


Cache = Tensor | Int8KV  # of the keys or of the values; both are of one kind


def list_tensors(key_cache: Cache, value_cache: Cache) -> list[Tensor]:
    """The tensors of both, keys first: 2 of them, or 4 in int8. ValueError for one of each kind."""
    if isinstance(key_cache, Int8KV) != isinstance(value_cache, Int8KV):
        raise ValueError(
            "attention: key_cache and value_cache must be of one kind, got an int8 one beside "
            "another; make both alike"
        )
    caches = (key_cache, value_cache)
    return [t for cache in caches for t in (cache if isinstance(cache, Int8KV) else (cache,))]


def list_with_scales(key_cache: Cache, value_cache: Cache) -> list[Tensor | None]:
    """Keys, their scale, values, their scale; without scales None in their place."""
    caches = (key_cache, value_cache)
    return [t for cache in caches for t in (cache if isinstance(cache, Int8KV) else (cache, None))]


def elements_of(cache: Cache) -> Tensor:
    """The tensor of keys or values themselves."""
    return cache.values if isinstance(cache, Int8KV) else cache
