"""Reading generation_config.json. No code of the model is ever executed."""

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

NAME = "generation_config.json"


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Reads a folder's generation config; None if it has none.

    Only its fields count: `custom_generate` and Python files beside it are ignored.

    Raises:
        ValueError: the file cannot be read, is not JSON, or has invalid fields.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}: must be a readable file, got {error.strerror}; check the file"
        ) from None
    except ValueError as error:  # not JSON, not UTF-8
        raise ValueError(f"{path}: must be JSON, got {error}; download the file again") from None
    if not isinstance(fields, dict):
        raise ValueError(
            f"{path}: must be a JSON object, got {type(fields).__name__}; download the file again"
        )
    _check_eos(path, fields.get("eos_token_id"))
    try:
        return GenerationConfig.from_dict(fields)
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: must be a valid generation config, got {reason}; correct the field"
        ) from None


def _check_eos(path: Path, eos: Any) -> None:
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token_id) is int for token_id in ids):
        raise ValueError(
            f"{path}:eos_token_id: must be an integer or a list of integers, got {eos!r}; correct "
            "the field"
        )
