"""Rotary and ALiBi position tables, computed once per stage.

Frequencies of scaled rope variants come from transformers' own ROPE_INIT_FUNCTIONS; only the plain
variant, which transformers keeps inside each model class, is written out here.
"""

import math
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dist_int8.models.spec import RotarySpec

# Variants whose frequencies do not depend on how long a sequence has become.
_FIXED = ("linear", "llama3", "yarn", "proportional")
# Variants that change frequencies once a sequence outgrows a length; exact up to that length.
_UP_TO_A_LENGTH = ("dynamic", "longrope")


def check_one_set(parameters: Any) -> None:
    """Refuses rope parameters that differ between layers; some releases of transformers fail there.

    Raises:
        ValueError: they are per layer type.
    """
    if not isinstance(parameters, dict):
        raise ValueError(
            f"config.json:rope_parameters: must be a mapping, got {parameters!r}; correct the field"
        )
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(
            "config.json:rope_parameters: rope parameters must be one set for all layers, got one "
            f"per layer type ({', '.join(parameters)}); use a model with a single rope variant"
        )


def describe_rotary(
    config: Any, head_dim: int, max_positions: int, *, whole_head: bool = False
) -> tuple[RotarySpec, int]:
    """Reads a config's `rope_parameters`.

    Args:
        config: transformers config with `rope_parameters` (transformers >= 5 builds it for old
            files too).
        head_dim: dimensions of one attention head.
        max_positions: the config's max_position_embeddings.
        whole_head: the family rotates whole heads, whatever partial_rotary_factor says, unless
            the rope is scaled.

    Returns:
        The rotary spec, and how many positions it is made for (`_count_positions`).

    Raises:
        ValueError: unknown or per-layer-type rope parameters.
    """
    parameters = config.rope_parameters or {}
    check_one_set(parameters)
    if parameters.get("mrope_section") is not None:
        raise ValueError(
            "config.json:rope_parameters.mrope_section: must be absent, got "
            f"{parameters['mrope_section']}; multimodal rope is not supported, use a text model"
        )
    variant = parameters.get("rope_type", "default")
    if variant == "default":
        # Su et al. 2021, equation 15: theta_i = base^(-2i/d), in fp32 as in transformers' models.
        factor = 1.0 if whole_head else parameters.get("partial_rotary_factor", 1.0)
        rotary_dim = int(head_dim * factor)
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponent), 1.0
    elif variant in _FIXED or variant in _UP_TO_A_LENGTH:
        inv_freq, scaling = _init_scaled(variant, config)
    else:
        known = ", ".join(["default", *_FIXED, *_UP_TO_A_LENGTH])
        raise ValueError(
            f"config.json:rope_parameters.rope_type: must be one of {known}, got {variant!r}; use "
            "a model with one of these rope variants"
        )
    if 2 * len(inv_freq) > head_dim or not len(inv_freq):
        raise ValueError(
            f"config.json:rope_parameters: rotated dimensions must be 2 to head_dim {head_dim}, "
            f"got {2 * len(inv_freq)}; check partial_rotary_factor and head_dim"
        )
    spec = RotarySpec(tuple(inv_freq.float().tolist()), float(scaling), variant)
    return spec, _count_positions(variant, parameters, max_positions)


def _init_scaled(variant: str, config: Any) -> tuple[torch.Tensor, float]:
    """Computes frequencies and attention scaling as transformers does.

    Raises:
        ValueError: parameters that are missing or give no finite numbers.
    """
    try:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[variant](config, torch.device("cpu"))
        is_usable = bool(inv_freq.isfinite().all()) and math.isfinite(scaling)
    except (ArithmeticError, TypeError, ValueError, LookupError, RuntimeError):
        is_usable = False
    if not is_usable:
        raise ValueError(
            f"config.json:rope_parameters: must be complete and consistent for {variant!r}, got "
            f"{config.rope_parameters}; correct the fields"
        )
    return inv_freq, scaling


def _count_positions(variant: str, parameters: dict[str, Any], max_positions: int) -> int:
    """Counts the positions that a model is made for, as vLLM derives its maximum length.

    linear and yarn stretch the context by their factor. Configs of llama3 have multiplied already.
    dynamic and longrope end where they would change the frequencies of a sequence that grows, which
    would contradict keys already in the cache.
    """
    factor = parameters.get("factor")
    if variant == "linear" and factor is not None:
        return max(max_positions, int(max_positions * factor))
    original = parameters.get("original_max_position_embeddings") or max_positions
    if variant == "yarn" and factor is not None:
        return max(max_positions, int(original * factor))
    return min(max_positions, original) if variant == "longrope" else max_positions


def make_rotary_tables(rotary: RotarySpec, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes cos and sin of every position, each fp32 [num_positions, R/2] on the CPU."""
    inv_freq = torch.tensor(rotary.inv_freq, dtype=torch.float32)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
    return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Computes ALiBi slopes, fp32 [num_heads], as in Press et al. 2022, section 3, and BLOOM.

    The first 2^k heads take the geometric sequence with ratio 2^(-8/2^k); the others every second
    member of the sequence for twice as many heads.
    """
    num_first = 2 ** math.floor(math.log2(num_heads))

    def sequence(num: int, step: int, count: int) -> torch.Tensor:
        base = torch.tensor(2.0 ** (-(2.0 ** -(math.log2(num) - 3))), dtype=torch.float32)
        return torch.pow(base, torch.arange(1, 1 + step * count, step, dtype=torch.int32))

    slopes = sequence(num_first, 1, num_first)
    if num_first == num_heads:
        return slopes
    return torch.cat([slopes, sequence(2 * num_first, 2, num_heads - num_first)])
