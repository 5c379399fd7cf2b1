"""The files that a command will write, checked before it begins."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

PICTURES = (".png", ".svg", ".pdf")


def check_target(source: str, key: str, path: Path | None, endings: Sequence[str] = ()) -> None:
    """Checks that a file can be written; nothing is created.

    Args:
        source: how an error begins, as in "dist-int8 plan".
        key: name of the option.
        path: the file; None: none will be written.
        endings: what its name may end with; empty: anything.

    Raises:
        ValueError: it is a folder, its folder is missing, or it must not be written.
    """
    if path is None:
        return
    folder = path.absolute().parent
    reason = None
    if endings and path.suffix not in endings:
        reason = f"another ending than {', '.join(endings)}"
    elif path.is_dir():
        reason = "a folder"
    elif not folder.is_dir():
        reason = f"no folder {str(folder)!r}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        reason = "no permission"
    if reason is not None:
        flag = "--" + key.replace("_", "-")
        raise ValueError(
            f"{source}:{key}: {flag} must be a file that can be written, got {str(path)!r} "
            f"({reason}); check the path"
        )


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Names the file in an OSError of a block that writes it: a full disk does not by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_picture(source: str, key: str, path: Path | None) -> None:
    """Checks that a picture can be drawn and written.

    Raises:
        ValueError: as `check_target`, or matplotlib is not installed.
    """
    check_target(source, key, path, PICTURES)
    if path is not None:
        from importlib.util import find_spec

        try:
            found = find_spec("matplotlib.figure") is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ValueError(
                f"{source}:{key}: matplotlib must be installed, got none; "
                'pip install "dist_int8[plot]"'
            )
