"""Text to measure on, and other text to calibrate on, as token ids of a model."""

import ast
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOPICS = "Python's help topics"
DOCSTRINGS = "docstrings of Python's standard library"
# More than tokens have on the average, in any text in words.
_CHARACTERS_PER_TOKEN = 32
# Long ones in plain English; none of them is among the help topics.
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
    """A text to measure on and what to call it.

    Args:
        path: a UTF-8 file, or a folder, whose files are joined in the order of their names (hidden
            ones and those that are not UTF-8 are left out); None: Python's help topics.

    Raises:
        ValueError: nothing there, or no text in it.
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
    """A text for methods that look at activations first; None: docstrings, no help topic."""
    return read_text(path) if path is not None else (_docstrings(), DOCSTRINGS)


def tokens_of(tokenizer: Any, text: str, most: int | None = None, skip: int = 0) -> Tensor:
    """Token ids of a text, int64 [tokens], without the first `skip` and at most `most`."""
    if most is not None:  # no need to read a library for its first page
        text = text[: (skip + most) * _CHARACTERS_PER_TOKEN]
    ids = tokenizer(text, verbose=False).input_ids[skip:]
    return torch.tensor(ids if most is None else ids[:most], dtype=torch.int64)


def _utf8(file: Path) -> str | None:
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _docstrings() -> str:
    """Docstrings read from the source files: nothing is imported."""
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
