"""JSON files of a model folder, with one line for everything that can be wrong with them."""

import json
from pathlib import Path
from typing import Any, NoReturn

_LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, with or without a byte order mark.

    Raises:
        ValueError: it cannot be read, is not UTF-8 or JSON (NaN and Infinity are not), is cut off,
            a pointer of git-lfs, or not an object.
    """
    if is_lfs_pointer(path):
        raise ValueError(
            f"{path}: must be JSON, got a pointer of git-lfs; run `git lfs pull` in the folder"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except OSError as error:
        raise ValueError(
            f"{path}: must be a file that can be read, got {error.strerror}; check its permissions"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: must be JSON in UTF-8, got byte 0x{error.object[error.start]:02x} at "
            f"{error.start}; download the file again"
        ) from None
    except RecursionError:
        raise ValueError(
            f"{path}: must be JSON, got too many levels of nesting; download the file again"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON, got {error}; download the file again") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: must be a JSON object, got {type(value).__name__}; download the file again"
        )
    return value


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what git leaves where git-lfs did not fetch the content."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not JSON")
