"""Reads the text to measure on, and another to calibrate on, as token ids of a model."""

import ast
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOPICS = "Python's help topics"
DOCSTRINGS = "docstrings of Python's standard library"
# An upper bound on the average, for any text in words.
_CHARACTERS_PER_TOKEN = 32
# Modules with long docstrings in plain English; none of them is among the help topics.
_DOCUMENTED = (
    "argparse",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "fractions",
    "heapq",
    "imaplib",
    "inspect",
    "logging",
    "mailbox",
    "optparse",
    "pickletools",
    "random",
    "shutil",
    "smtplib",
    "statistics",
    "subprocess",
    "tarfile",
    "turtle",
    "zipfile",
)


def read_text(path: str | Path | None) -> tuple[str, str]:
    """Reads a text to measure on and returns it with its name.

    Args:
        path: UTF-8 file, or folder whose files are joined in the order of their names (hidden files
            and those that are not UTF-8 are skipped); None: Python's help topics.

    Raises:
        ValueError: the path cannot be read, or there is no text in it.
    """
    if path is None:
        import pydoc_data.topics

        return "\n".join(pydoc_data.topics.topics.values()), TOPICS
    path = Path(path)
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        texts = [text for file in files if (text := _utf8(file))]
    else:
        try:
            texts = [path.read_bytes().decode("utf-8")]
        except OSError as error:
            raise ValueError(
                f"eval: text must be a file or a folder that can be read, got {str(path)!r} "
                f"({error.strerror}); check the path"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: text must be UTF-8, got byte {error.object[error.start]:#04x} at "
                f"{error.start}; convert it to UTF-8"
            ) from None
    text = "\n".join(texts)
    if not text.strip():
        raise ValueError(f"{path}: text must have words in it, got nothing; name another")
    return text, str(path)


def calibration_text(path: str | Path | None) -> tuple[str, str]:
    """Reads a text for the methods that need activations; None: docstrings of Python's library."""
    return read_text(path) if path is not None else (_docstrings(), DOCSTRINGS)


def tokens_of(tokenizer: Any, text: str, most: int | None = None, skip: int = 0) -> Tensor:
    """Encodes a text as int64 [tokens]: at most `most` token ids, after the first `skip`."""
    if most is not None:  # do not encode a long text for its first few tokens
        text = text[: (skip + most) * _CHARACTERS_PER_TOKEN]
    ids = tokenizer(text, verbose=False).input_ids[skip:]
    return torch.tensor(ids if most is None else ids[:most], dtype=torch.int64)


def _utf8(file: Path) -> str | None:
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _docstrings() -> str:
    """Reads docstrings from the source files without importing them."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for name in _DOCUMENTED:
        file = folder / f"{name}.py"
        if not file.is_file():
            file = folder / name / "__init__.py"
        if not file.is_file():
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                found.append(text)
    return "\n\n".join(found)
