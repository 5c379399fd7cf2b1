"""SHA256SUMS: the checksum of every file of a folder, as `sha256sum -c SHA256SUMS` reads it."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\0\n]+)")
_BLOCK = 1 << 20


def as_text(sums: Mapping[str, str]) -> str:
    """Writes the manifest of files with their sums, by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def read(folder: str | Path) -> dict[str, str]:
    """Reads the sum of every file that the manifest names.

    Raises:
        ValueError: no manifest, or not one.
    """
    path = Path(folder) / NAME
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: must be a folder, got none there; check the path")
    if not path.is_file():
        raise ValueError(
            f"{path}: folder must hold a manifest, got none; only what `dist-int8 quantize` and "
            "`dequantize` wrote can be verified"
        )
    sums = {}
    for line in path.read_text(errors="replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path}: every line must be a sha256 sum and a name, got {line[:80]!r}; write the "
                "checkpoint again"
            )
        sums[match[2]] = match[1]
    return sums


def num_bytes(folder: str | Path) -> int:
    """Counts the bytes that `verify` reads."""
    paths = [Path(folder) / name for name in read(folder)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def verify(folder: str | Path, progress: Callable[[int], object] | None = None) -> int:
    """Reads every file of the manifest and returns their number.

    Args:
        folder: of a checkpoint that we wrote.
        progress: called with the number of bytes just read.

    Raises:
        ValueError: naming every file that is missing, changed or, if it holds tensors, unknown.
    """
    folder = Path(folder)
    sums = read(folder)
    problems = []
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"missing file {name}")
            continue
        digest = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    if progress is not None:
                        progress(len(block))
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
            continue
        if digest.hexdigest() != expected:
            problems.append(f"{name} has changed: sha256 {digest.hexdigest()[:12]}...")
    problems += [
        f"unknown file {path.name}"
        for path in sorted(folder.glob("*.safetensors"))
        if path.name not in sums
    ]
    if problems:
        raise ValueError(
            f"{folder}: checkpoint must be as it was written, got {len(problems)} problem(s): "
            f"{'; '.join(problems)}; copy or write it again"
        )
    return len(sums)
