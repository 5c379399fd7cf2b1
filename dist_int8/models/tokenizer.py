"""The tokenizer of a model, and text as its tokens. No code of the model is ever executed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dist_int8.models.json_file import read_json
from dist_int8.models.tokenizer_files import (
    check_class,
    check_tokenizer_files,
    find_tokenizer_files,
)

logger = logging.getLogger(__name__)

# More than any tokenizer packs into one token, so that only the beginning of a large file is read.
_BYTES_PER_TOKEN = 64
_ENGLISH = "Hello, this is a test of 3 words."


def read_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Any:
    """Reads transformers' tokenizer of a folder; None if the folder has no tokenizer files.

    Args:
        folder: of the model.
        vocab_size: rows of the model's embedding, which the token ids must be below; None: unknown.

    Raises:
        ValueError: the tokenizer is damaged, cannot be read, does not fit the model, or would run
            code of its own.
    """
    folder = Path(folder)
    names = find_tokenizer_files(folder)
    if not names:
        return None
    check_tokenizer_files(folder, names)
    _check_config(folder)
    tokenizer = _load(folder, local_files_only=True)
    _check_use(folder, tokenizer, vocab_size)
    return tokenizer


def load_tokenizer(
    model: str | Path,
    *,
    vocab_size: int | None = None,
    gguf_file: str | None = None,
    advice: str = "add its files",
) -> Any:
    """Loads transformers' tokenizer of a model that must have one.

    Args:
        model: folder.
        vocab_size: rows of the model's embedding; None: unknown.
        gguf_file: name of the GGUF file in the folder to read the tokenizer from.
        advice: what the error tells the user to do where there is none.

    Raises:
        ValueError: there is none, or as `read_tokenizer`.
    """
    if gguf_file is not None:
        return _load(Path(model), gguf_file=gguf_file)
    tokenizer = read_tokenizer(model, vocab_size) if Path(model).is_dir() else None
    if tokenizer is None:
        raise ValueError(f"{model}: must hold a tokenizer to read a text, got none; {advice}")
    return tokenizer


def _load(folder: Path, **options: Any) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
    except BaseException as error:
        # whatever a damaged file makes of the readers of transformers and `tokenizers`
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason or _names_code(folder):
            raise ValueError(
                f"{folder}: tokenizer must be one of transformers, got one that is Python code of "
                "the folder (auto_map in tokenizer_config.json or config.json), which is never "
                "run; use a tokenizer.json and remove auto_map and tokenizer_class"
            ) from None
        raise ValueError(
            f"{folder}: must hold a tokenizer that transformers reads, got "
            f"{type(error).__name__}: {reason[:300]}; download its files again"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"{folder}: must hold a tokenizer, got a {type(tokenizer).__name__}; correct "
            "tokenizer_class in tokenizer_config.json"
        )
    return tokenizer


def _names_code(folder: Path) -> bool:
    """Whether config.json names code of the folder as its tokenizer."""
    auto_map = _read_config(folder).get("auto_map")
    return isinstance(auto_map, dict) and "AutoTokenizer" in auto_map


def _check_config(folder: Path) -> None:
    """Checks the class that config.json names, where tokenizer_config.json names none."""
    check_class(folder / "config.json", _read_config(folder).get("tokenizer_class"))


def _read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json; {} if there is none. Raises ValueError for one that is not JSON."""
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


def _check_use(folder: Path, tokenizer: Any, vocab_size: int | None) -> None:
    """Raises ValueError for a tokenizer that cannot read English, or not for this model."""
    try:
        ids = list(tokenizer(_ENGLISH, add_special_tokens=False).input_ids)
        begun = list(tokenizer(_ENGLISH).input_ids)
    except Exception as error:  # whatever a damaged vocabulary makes of it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{folder}: tokenizer must read a text, got {type(error).__name__}: {reason[:300]}; "
            "download its files again"
        ) from None
    if all(token_id in (None, tokenizer.unk_token_id) for token_id in ids):
        got = f"{len(ids)} unknown ones" if ids else "none"
        raise ValueError(
            f"{folder}: tokenizer must have tokens for English, got {got} for {_ENGLISH!r}; "
            "download its vocabulary again"
        )
    if vocab_size is not None:
        _check_ids(folder, tokenizer, begun, vocab_size)


def _check_ids(folder: Path, tokenizer: Any, begun: list[int], vocab_size: int) -> None:
    """Checks token ids against the embedding.

    Ids of added tokens may lie past it, as that of a padding token in some conversions of Llama:
    no text leads to them unless it spells the token, and such a prompt is refused by itself. Any
    other id past the embedding means that the tokenizer is another model's.
    """
    special = set(tokenizer.all_special_ids)  # MistralCommonBackend tells of no added tokens
    if hasattr(tokenizer, "get_added_vocab"):
        special |= set(tokenizer.get_added_vocab().values())
    added = special - set(begun)
    past = [
        (token_id, token)
        for token, token_id in tokenizer.get_vocab().items()
        if token_id >= vocab_size
    ]
    wrong = [pair for pair in past if pair[0] not in added]
    if wrong:
        token_id, token = max(wrong)
        raise ValueError(
            f"{folder}: token ids of the tokenizer must be below {vocab_size}, the rows of the "
            f"model's embedding, got {token_id} for {token!r}; take this model's tokenizer"
        )
    if past:
        logger.warning(
            "%s: %d added tokens, such as %r, have no row in the model's embedding of %d; prompts "
            "with them are refused",
            folder,
            len(past),
            min(past)[1],
            vocab_size,
        )


def read_tokens(
    folder: str | Path, path: str | Path, max_tokens: int, vocab_size: int | None = None
) -> Tensor:
    """Reads the first tokens of a text file, int64 [up to `max_tokens`].

    Args:
        folder: of the model, with its tokenizer.
        path: of the text, UTF-8.
        max_tokens: maximum number of tokens to return.
        vocab_size: rows of the model's embedding; None: unknown.

    Raises:
        ValueError: no such file, no tokenizer, or one that cannot be used.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(max_tokens * _BYTES_PER_TOKEN).decode("utf-8", errors="ignore")
    except OSError as error:
        raise ValueError(
            f"calibrate: calibrate must be random, off or a text file, got {str(path)!r} "
            f"({error.strerror}); check the path"
        ) from None
    tokenizer = load_tokenizer(folder, vocab_size=vocab_size, advice="calibrate with random tokens")
    ids = tokenizer(text, truncation=True, max_length=max_tokens).input_ids
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)
