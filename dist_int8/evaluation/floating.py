"""A model in transformers itself, in floating point. No code of the model is ever executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dist_int8.models import load_config


def load_floating_model(
    folder: str | Path, dtype: torch.dtype | str, *, allow_pickle: bool = False
) -> Any:
    """Loads transformers' model of a folder.

    Args:
        folder: folder of the model.
        dtype: of the parameters; "auto": the stored one.
        allow_pickle: whether to take `pytorch_model.bin` where there is no safetensors file.

    Raises:
        ValueError, OSError, ImportError: transformers cannot load the folder in floating point.
    """
    config = load_config(folder)
    config._attn_implementation = None  # a folder may name a kernel to be fetched and run
    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=None if allow_pickle else True,
    )
