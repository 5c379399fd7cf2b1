"""The files of a tokenizer, checked before transformers reads them.

transformers makes up an empty tokenizer where files are missing, reads a SentencePiece model as
something else where it cannot, and loads whatever class a folder names. So what is wrong with a
file is found here, where it can be said.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

CONFIG = "tokenizer_config.json"
_COMPLETE = "tokenizer.json"  # holds everything, so that the other vocabularies are not read
_SENTENCEPIECE = ("*.model", "tokenizer.model.*")
_VOCABULARIES = (
    _COMPLETE,
    *_SENTENCEPIECE,
    "tekken.json",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
)
_ADDITIONS = (CONFIG, "special_tokens_map.json", "added_tokens.json")
_LFS = b"version https://git-lfs"


def find_tokenizer_files(folder: Path) -> list[str]:
    """Lists the names of a folder's tokenizer files, in order; chat templates are none."""
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name in _ADDITIONS or _is_vocabulary(name)]


def check_tokenizer_files(folder: Path, names: list[str]) -> None:
    """Checks tokenizer files as far as it goes without reading the vocabulary.

    Args:
        folder: of the model.
        names: of its tokenizer files.

    Raises:
        ValueError: a file is damaged, a pointer to one, or missing, or names a class that is no
            tokenizer.
    """
    for name in names:
        _check_content(folder / name)
    for name in _ADDITIONS:
        if name in names:
            fields = _read_fields(folder / name)
            if name == CONFIG:
                check_class(folder / name, fields.get("tokenizer_class"))
    vocabularies = [name for name in names if _is_vocabulary(name)]
    if not vocabularies:
        raise ValueError(
            f"{folder}: must hold the tokenizer's vocabulary, such as tokenizer.json, got "
            f"{names[0]} alone; download the folder again"
        )
    if _COMPLETE not in vocabularies:
        for name in vocabularies:
            if any(fnmatch(name, pattern) for pattern in _SENTENCEPIECE):
                _check_sentencepiece(folder / name)


def check_class(path: Path, name: Any) -> None:
    """Raises ValueError for the name of a class in `path` that is no tokenizer of transformers.

    transformers would load any of its own classes by name, and some of them (the Auto classes,
    RagTokenizer) load another folder's code once the user says yes.
    """
    if name is None:
        return
    if isinstance(name, str):
        plain = name.removesuffix("Fast")
        found = [tokenizer_class_from_name(each) for each in (name, plain, f"{plain}Fast")]
        kinds = [kind for kind in found if kind is not None]
        missing = [kind for kind in kinds if type(kind).__name__ == "DummyObject"]
        if all(kind in missing or _is_tokenizer(kind) for kind in kinds):
            return  # a name that transformers lacks is read from tokenizer.json
    raise ValueError(
        f"{path}:tokenizer_class: must be a tokenizer of transformers, got {name!r}; correct the "
        "field"
    )


def _is_tokenizer(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase)


def _is_vocabulary(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _VOCABULARIES)


def _check_content(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: must be a file, got a folder; download the file again")
    try:
        with path.open("rb") as file:
            begin = file.read(len(_LFS))
            file.seek(max(0, file.seek(0, 2) - 64))
            end = file.read().rstrip()
    except OSError as error:
        raise ValueError(
            f"{path}: must be a readable file, got {error.strerror}; check the file"
        ) from None
    if not end:
        raise ValueError(f"{path}: must hold data, got an empty file; download the file again")
    if begin == _LFS:
        raise ValueError(
            f"{path}: must be the file itself, got a pointer of git-lfs; run git lfs pull in "
            f"{path.parent}, or download the file again"
        )
    if path.suffix == ".json" and not (begin.lstrip().startswith(b"{") and end.endswith(b"}")):
        raise ValueError(
            f"{path}: must be a JSON object, got a file that is cut off or something "
            "else; download the file again"
        )


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # not JSON, not UTF-8
        raise ValueError(f"{path}: must be JSON, got {error}; download the file again") from None


def _check_sentencepiece(path: Path) -> None:
    """Reads a SentencePiece model, so that it is not read as something else if it is damaged."""
    if _is_tiktoken(path):
        return
    try:
        import google.protobuf  # noqa: F401, transformers reads the model with it
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError(
            f"{path}: packages sentencepiece and protobuf must be installed to read it, got "
            f"{error}; pip install sentencepiece protobuf"
        ) from None
    try:
        SentencePieceProcessor().Load(str(path))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: must be a SentencePiece model, got {reason}; download the file again"
        ) from None


def _is_tiktoken(path: Path) -> bool:
    """Whether a file has lines of base64 and rank, as the vocabularies of tiktoken."""
    with path.open("rb") as file:
        line = file.readline(256).split()
    return len(line) == 2 and line[1].isdigit()
