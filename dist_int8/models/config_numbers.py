"""The numbers of a config.json, checked before a config class fills in what is missing.

transformers would take a size of another model for one that is absent, and fail on a zero with a
traceback, or much later.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LARGEST_SIZE = 131072  # of K in one int8 product; no model has as many blocks
_LARGEST_COUNT = 2**27  # of tokens in a vocabulary or a context
_LARGEST_REAL = 1e18


@dataclass(frozen=True)
class _Size:
    """A number of something, which has several names; `families` (model types) must state it."""

    names: tuple[str, ...]
    most: int = _LARGEST_SIZE
    least: int = 1
    families: tuple[str, ...] = ()

    def check(self, where: str, fields: Mapping[str, Any]) -> None:
        present = [name for name in self.names if fields.get(name) is not None]
        if not present and fields["model_type"] in self.families:
            raise ValueError(
                f"{where}:{self.names[0]}: must be an integer, got nothing; download the file again"
            )
        for name in present:
            value = fields[name]
            if type(value) is not int or not self.least <= value <= self.most:
                raise ValueError(
                    f"{where}:{name}: must be {_describe(self.least, self.most)}, got {value!r}; "
                    "correct the field"
                )


_GATED = ("llama", "mistral", "qwen2")
_ALL = (*_GATED, "bloom", "opt", "gpt_neox")
_SIZES = (
    _Size(("hidden_size", "n_embed"), families=_ALL),
    _Size(("num_hidden_layers", "n_layer"), families=_ALL),
    _Size(("num_attention_heads", "n_head"), families=_ALL),
    _Size(("vocab_size",), _LARGEST_COUNT, families=_ALL),
    _Size(("intermediate_size",), families=(*_GATED, "gpt_neox")),
    _Size(("ffn_dim",), families=("opt",)),
    _Size(("num_key_value_heads",)),
    _Size(("head_dim",)),
    _Size(("n_inner",)),
    _Size(("word_embed_proj_dim",)),
    _Size(("max_position_embeddings",), _LARGEST_COUNT),
    _Size(("original_max_position_embeddings",), _LARGEST_COUNT),
    _Size(("sliding_window",), _LARGEST_COUNT, least=0),
    _Size(("max_window_layers",), _LARGEST_COUNT, least=0),
    _Size(("pretraining_tp",)),
)
# name: whether 0 is allowed, largest
_REALS: dict[str, tuple[bool, float]] = {
    "rms_norm_eps": (True, 1.0),
    "layer_norm_eps": (True, 1.0),
    "layer_norm_epsilon": (True, 1.0),
    "rope_theta": (False, _LARGEST_REAL),
    "rotary_emb_base": (False, _LARGEST_REAL),
    "rotary_pct": (False, 1.0),
}
_ROPE_REALS: dict[str, tuple[bool, float]] = {
    "rope_theta": (False, _LARGEST_REAL),
    "partial_rotary_factor": (False, 1.0),
    "factor": (False, _LARGEST_REAL),
    "attention_factor": (True, _LARGEST_REAL),
    "beta_fast": (False, _LARGEST_REAL),
    "beta_slow": (False, _LARGEST_REAL),
    "low_freq_factor": (False, _LARGEST_REAL),
    "high_freq_factor": (False, _LARGEST_REAL),
    "mscale": (True, _LARGEST_REAL),
    "mscale_all_dim": (True, _LARGEST_REAL),
}
_ROPE_SIZE = _Size(("original_max_position_embeddings",), _LARGEST_COUNT)
_ROPE_LISTS = ("short_factor", "long_factor")


def check_numbers(where: str, fields: Mapping[str, Any]) -> None:
    """Checks every number that a model of a supported family is made from.

    Args:
        where: the file, for messages.
        fields: of config.json, with a known model_type.

    Raises:
        ValueError: a size that is absent, not a whole number or out of range; heads that do not
            divide the hidden size; a rope parameter that is no number.
    """
    for size in _SIZES:
        size.check(where, fields)
    for name, limits in _REALS.items():
        if name in fields:
            _check_real(f"{where}:{name}", fields[name], *limits)
    _check_heads(where, fields)
    _check_real(
        f"{where}:partial_rotary_factor",
        1.0 if (factor := fields.get("partial_rotary_factor")) is None else factor,
        False,
        1.0,
    )
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(parameters := fields.get(key), dict):
            _check_rope(f"{where}:{key}", {**parameters, "model_type": fields["model_type"]})


def _check_heads(where: str, fields: Mapping[str, Any]) -> None:
    hidden = _find(fields, "n_embed", "hidden_size")
    heads, head_dim = _find(fields, "num_attention_heads", "n_head"), fields.get("head_dim")
    if hidden % heads and head_dim is None:
        raise ValueError(
            f"{where}:num_attention_heads: must divide hidden_size {hidden}, got {heads}; correct "
            "the field"
        )
    kv_heads = fields.get("num_key_value_heads")
    if kv_heads is not None and heads % kv_heads:
        raise ValueError(
            f"{where}:num_key_value_heads: must divide num_attention_heads {heads}, got "
            f"{kv_heads}; correct the field"
        )
    size = hidden // heads if head_dim is None else head_dim
    if fields["model_type"] in _GATED and size % 2:
        raise ValueError(
            f"{where}:head_dim: must be even, because rotary embeddings turn pairs, got {size}; "
            "correct the field"
        )


def _check_rope(where: str, parameters: Mapping[str, Any]) -> None:
    for name, limits in _ROPE_REALS.items():
        if parameters.get(name) is not None or (name == "factor" and name in parameters):
            _check_real(f"{where}.{name}", parameters[name], *limits)
    value = parameters.get(_ROPE_SIZE.names[0])
    if value is not None:
        _ROPE_SIZE.check(where, {"model_type": "", _ROPE_SIZE.names[0]: value})
    for name in _ROPE_LISTS:
        factors = parameters.get(name)
        if factors is None:
            continue
        if not isinstance(factors, list):
            raise ValueError(
                f"{where}.{name}: must be a list of numbers, got {factors!r}; correct the field"
            )
        for factor in factors:
            _check_real(f"{where}.{name}", factor, False, _LARGEST_REAL)


def _check_real(where: str, value: Any, has_zero: bool, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and (0 < value <= most or (has_zero and value == 0)):
        return
    least = "at least 0" if has_zero else "above 0"
    limit = f" and at most {most:g}"
    raise ValueError(f"{where}: must be a number {least}{limit}, got {value!r}; correct the field")


def _describe(least: int, most: int) -> str:
    return (
        f"an integer of {least} to {most}"
        if most < _LARGEST_COUNT
        else f"an integer of at least {least}"
    )


def _find(fields: Mapping[str, Any], *names: str) -> int:
    return next(int(fields[name]) for name in names if fields.get(name) is not None)
