"""Files that survive a power failure: whole under their name, or not there."""

import os
from pathlib import Path

UNFINISHED = ".writing"  # suffix of a file that is not whole yet


def write_file(path: Path, content: bytes) -> None:
    """Writes a file through to the disk: it is whole under its name, or not there."""
    writing = path.with_name(f"{path.name}{UNFINISHED}")
    with writing.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    writing.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Writes the names in a folder through to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
