"""The command line of checkpoints: `dist-int8 quantize | dequantize | verify`."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_int8.config import load_settings, parse_byte_size

_INT8_FORMATS = ("dist_int8", "bitsandbytes")
_QUIET = typer.Option("--quiet", "-q", help="No progress on stderr.")
_MODEL = typer.Argument(metavar="MODEL", help="Folder of a transformers checkpoint, or a hub id.")
_OUT = typer.Argument(metavar="OUT", help="New folder; it appears when all of it is on the disk.")
_REVISION = typer.Option(help="Commit, tag or branch of a hub id.")
_SHARD_SIZE = typer.Option(help="Size of the files, and what a killed run loses at most.")
_DEVICE = typer.Option(help="Where rows are worked on: cpu or cuda:N.")
_VERIFY = typer.Option("--verify", help="Read it all back and compare its sha256 sums.")
_PICKLE = typer.Option(
    "--allow-pickle", help="Read .bin files if there is no safetensors file; trust who made them."
)


def quantize(
    model: Annotated[str, _MODEL],
    out: Annotated[Path, _OUT],
    form: Annotated[
        str, typer.Option("--format", help="dist_int8, or bitsandbytes to load in transformers.")
    ] = "dist_int8",
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Linears that stay floating, by name; repeat it. [default: lm_head]"),
    ] = None,
    hot_columns: Annotated[
        Path | None,
        typer.Option(help='JSON of input features to keep exactly: {"blocks.0.qkv": [3, 17]}.'),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Find the input features to keep exactly with random tokens (random) or a text "
            "file; or off. [default: random, if MODEL is floating-point]"
        ),
    ] = None,
    num_hot_columns: Annotated[
        int, typer.Option(help="So many of each linear: 0 or a multiple of 16.")
    ] = 16,
    head: Annotated[
        str | None, typer.Option(help="int8 or 16bit. [default: 16bit, as --skip has it]")
    ] = None,
    embedding: Annotated[str, typer.Option(help="int8 or 16bit.")] = "16bit",
    shard_size: Annotated[str, _SHARD_SIZE] = "2GB",
    device: Annotated[str, _DEVICE] = "cpu",
    revision: Annotated[str | None, _REVISION] = None,
    allow_pickle: Annotated[bool, _PICKLE] = False,
    verify: Annotated[bool, _VERIFY] = False,
    quiet: Annotated[bool, _QUIET] = False,
) -> None:
    """Write an int8 checkpoint: half the bytes, loaded on any number of stages as it is.

    A killed or interrupted run is continued by the same command. A checkpoint that is int8
    already is written in the other form, its int8 values unchanged.

        dist-int8 quantize ./llama ./llama-int8 --verify
        dist-int8 quantize ./llama ./llama-int8 --calibrate my-text.txt --head int8
        dist-int8 quantize ./llama ./llama-bnb --format bitsandbytes
    """
    if form not in _INT8_FORMATS:
        raise ValueError(
            f"dist-int8 quantize:format: format must be one of {', '.join(_INT8_FORMATS)}, got "
            f"{form!r}; choose one"
        )
    columns = None if hot_columns is None else _read_hot_columns(hot_columns)
    shard_bytes = _byte_size("quantize", shard_size)
    # one place says what these may be
    settings = load_settings(
        source="dist-int8 quantize",
        calibrate=calibrate,
        num_hot_columns=num_hot_columns,
        head=head,
        embedding=embedding,
        skip_modules=skip,
    )
    from dist_int8.checkpoint import OFF, RANDOM, is_int8, resolve_model
    from dist_int8.checkpoint.writer import quantize as plan

    folder = resolve_model(model, revision, allow_pickle=allow_pickle)
    if calibrate is None:
        has_none = form == "bitsandbytes" or columns is not None
        calibrate = OFF if has_none or is_int8(folder, allow_pickle) else RANDOM
    job = plan(
        folder,
        out,
        target="bitsandbytes" if form == "bitsandbytes" else "dist_int8",
        skip=settings.skipped,
        embedding_int8=settings.embedding == "int8",
        hot_columns=columns,
        calibrate=calibrate,
        num_hot_columns=num_hot_columns,
        shard_bytes=shard_bytes,
        device=device,
        allow_pickle=allow_pickle,
    )
    _run(job, "quantizing", verify, quiet)


def dequantize(
    model: Annotated[str, _MODEL],
    out: Annotated[Path, _OUT],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16. [default: that of config.json]"),
    ] = None,
    shard_size: Annotated[str, _SHARD_SIZE] = "2GB",
    device: Annotated[str, _DEVICE] = "cpu",
    revision: Annotated[str | None, _REVISION] = None,
    allow_pickle: Annotated[bool, _PICKLE] = False,
    verify: Annotated[bool, _VERIFY] = False,
    quiet: Annotated[bool, _QUIET] = False,
) -> None:
    """Write a floating-point checkpoint of an int8 one: ours, or bitsandbytes' in any layout.

    dist-int8 dequantize ./llama-int8 ./llama-again --dtype bfloat16
    """
    shard_bytes = _byte_size("dequantize", shard_size)
    from dist_int8.checkpoint import resolve_model
    from dist_int8.checkpoint.writer import dequantize as plan

    job = plan(
        resolve_model(model, revision, allow_pickle=allow_pickle),
        out,
        dtype=dtype,
        shard_bytes=shard_bytes,
        device=device,
        allow_pickle=allow_pickle,
    )
    _run(job, "dequantizing", verify, quiet)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint we wrote.")],
    quiet: Annotated[bool, _QUIET] = False,
) -> None:
    """Compare every file of a checkpoint with its sha256 sum, as `sha256sum -c SHA256SUMS` does.

    dist-int8 verify ./llama-int8
    """
    _verify(folder, quiet)


def _run(job: Any, verb: str, verify: bool, quiet: bool) -> None:
    def note(line: str) -> None:
        if not quiet:
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)

    with _bar(verb, job.num_bytes_read + job.num_bytes, quiet) as progress:
        made = job.run(progress, note)
    if not made:
        note(f"{job.out}: complete already")
    if verify:
        _verify(job.out, quiet)
    elif not quiet:
        typer.echo(f"{job.out}: {job.num_shards} file(s), {job.num_bytes} bytes of tensors")


def _verify(folder: Path, quiet: bool) -> None:
    from dist_int8.checkpoint.writer import manifest

    with _bar("verifying", manifest.num_bytes(folder), quiet) as progress:
        num_files = manifest.verify(folder, progress)
    if not quiet:
        typer.echo(f"{folder}: {num_files} files are as they were written")


@contextlib.contextmanager
def _bar(verb: str, num_bytes: int, quiet: bool) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(
        total=num_bytes,
        desc=verb,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=True if quiet else None,
        leave=False,
    ) as bar:
        yield bar.update


def _byte_size(command: str, text: str) -> int:
    try:
        return parse_byte_size(text)
    except ValueError as error:
        raise ValueError(f"dist-int8 {command}:shard_size: shard_size {error}") from None


def _read_hot_columns(path: Path) -> dict[str, list[int]]:
    try:
        columns = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: hot_columns must be a JSON file, got {error}") from None
    is_mapping = isinstance(columns, dict) and all(
        isinstance(listed, list) and all(type(column) is int for column in listed)
        for listed in columns.values()
    )
    if not is_mapping:
        raise ValueError(
            f"{path}: hot_columns must map names of linears to lists of input features, got "
            'something else; write {"blocks.0.qkv": [3, 17]}'
        )
    return columns
