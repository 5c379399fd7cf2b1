"""The tokenizer of a model, and text as its tokens. No code of the model is ever executed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

# More than any tokenizer packs into one token, so that only the beginning of a large file is read.
_BYTES_PER_TOKEN = 64


def load_tokenizer(
    model: str | Path, *, gguf_file: str | None = None, advice: str = "add its files"
) -> Any:
    """Loads transformers' tokenizer of a model.

    Args:
        model: folder or hub id.
        gguf_file: name of the GGUF file in the folder to read the tokenizer from.
        advice: what the error tells the user to do.

    Raises:
        ValueError: there is none, or only one that would run code of its own.
    """
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{model}: must hold a tokenizer to read a text, got none ({reason}); {advice}"
        ) from None


def read_tokenizer(folder: Path, vocab_size: int) -> Any:
    """transformers' tokenizer of a model, or None if its folder has no tokenizer files."""
    try:
        return load_tokenizer(folder)
    except ValueError:
        return None


def read_tokens(folder: str | Path, path: str | Path, max_tokens: int) -> Tensor:
    """Reads the first tokens of a text file, int64 [up to `max_tokens`].

    Args:
        folder: of the model, with its tokenizer.
        path: of the text, UTF-8.
        max_tokens: maximum number of tokens to return.

    Raises:
        ValueError: no such file, or no tokenizer.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(max_tokens * _BYTES_PER_TOKEN).decode("utf-8", errors="ignore")
    except OSError as error:
        raise ValueError(
            f"calibrate: calibrate must be random, off or a text file, got {str(path)!r} "
            f"({error.strerror}); check the path"
        ) from None
    tokenizer = load_tokenizer(folder, advice="calibrate with random tokens")
    ids = tokenizer(text, truncation=True, max_length=max_tokens).input_ids
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)
