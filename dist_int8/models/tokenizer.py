"""Text as the tokens of a model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

# More than any tokenizer makes one token of, so that a large file is not read for its beginning.
_BYTES_PER_TOKEN = 64


def read_tokens(folder: str | Path, path: str | Path, most: int) -> Tensor:
    """The first tokens of a text file, int64 [at most `most`].

    Args:
        folder: of the model, with its tokenizer.
        path: of the text, UTF-8.
        most: tokens.

    Raises:
        ValueError: no such file, or no tokenizer.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(most * _BYTES_PER_TOKEN).decode("utf-8", errors="ignore")
    except OSError as error:
        raise ValueError(
            f"calibrate: calibrate must be random, off or a text file, got {str(path)!r} "
            f"({error.strerror}); check the path"
        ) from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{folder}: must hold a tokenizer to read a text, got none ({reason}); calibrate with "
            "random tokens"
        ) from None
    ids = tokenizer(text, truncation=True, max_length=most).input_ids
    return torch.tensor(ids[:most], dtype=torch.int64)
