"""`dist-int8 quantize`, `dequantize` and `verify`: writes and checks checkpoints."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_int8.cli.options import Given, log_flags, option, setting_flag, settings_flags, takes
from dist_int8.cli.plural import count
from dist_int8.config import load_settings, parse_byte_size

INT8_FORMATS = ("dist_int8", "bitsandbytes")

_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a transformers checkpoint, or a hub id.")
]
_Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="New folder; it appears once it is complete on disk.")
]
_ShardSize = Annotated[
    str,
    option(None, "Size of each file, and the most a killed run loses.", show_default=True),
]
_Device = Annotated[
    str, option(None, "Device that computes the new weights: cpu or cuda:N.", show_default=True)
]
_Verify = Annotated[
    bool, option(None, "Read everything back and compare its sha256 sums.", "--verify")
]
_SOURCE_FLAGS = [
    setting_flag(None, "revision"),
    setting_flag(None, "allow_pickle", "--allow-pickle"),
]


@dataclass(frozen=True)
class QuantizeOptions:
    """Arguments and options of `quantize` alone."""

    model: _Model
    out: _Out
    format: Annotated[
        str,
        option(
            None,
            "dist_int8, or bitsandbytes to load the result in transformers.",
            show_default=True,
        ),
    ] = "dist_int8"
    hot_columns: Annotated[
        Path | None,
        option(None, 'JSON of input features to keep exactly: {"blocks.0.qkv": [3, 17]}.'),
    ] = None
    shard_size: _ShardSize = "2GB"
    device: _Device = "cpu"
    verify: _Verify = False


@dataclass(frozen=True)
class DequantizeOptions:
    """Arguments and options of `dequantize` alone."""

    model: _Model
    out: _Out
    dtype: Annotated[
        str | None,
        option(None, "float32, float16 or bfloat16. (default: that of config.json)"),
    ] = None
    shard_size: _ShardSize = "2GB"
    device: _Device = "cpu"
    verify: _Verify = False


@dataclass(frozen=True)
class VerifyOptions:
    """Argument of `verify`."""

    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A checkpoint that dist-int8 wrote.")
    ]


@takes(
    QuantizeOptions,
    [
        setting_flag(
            None,
            "skip_modules",
            text="Name of a linear that stays in floating point; repeat it. (default: lm_head)",
        ),
        setting_flag(
            None,
            "calibrate",
            text="How to find the input features to keep exactly: random (with random tokens), a "
            "text file, or off. (default: random, if MODEL is floating-point)",
        ),
        *settings_flags(None, "accuracy", "rotation", "num_hot_columns"),
        setting_flag(
            None, "head", text="Format of the head, int8 or 16bit. (default: 16bit, by --skip)"
        ),
        setting_flag(
            None,
            "embedding",
            text="Format of the token embedding, int8 or 16bit. (default: 16bit)",
        ),
        *_SOURCE_FLAGS,
        *log_flags(None),
    ],
)
def quantize(options: QuantizeOptions, given: Given) -> None:
    """Write an int8 checkpoint: half the bytes, and it loads on any number of stages.

    The same command continues a killed or interrupted run. A checkpoint that is already int8 is
    written in the other format, its int8 values unchanged.

        dist-int8 quantize ./llama ./llama-int8 --verify
        dist-int8 quantize ./llama ./llama-int8 --calibrate my-text.txt --head int8
        dist-int8 quantize ./llama ./llama-bnb --format bitsandbytes
    """
    if options.format not in INT8_FORMATS:
        raise ValueError(
            f"dist-int8 quantize:format: --format must be one of {', '.join(INT8_FORMATS)}, got "
            f"{options.format!r}; choose one"
        )
    columns = None if options.hot_columns is None else _read_hot_columns(options.hot_columns)
    shard_bytes = _parse_shard_size("quantize", options.shard_size)
    settings = load_settings(source="dist-int8 quantize", flags=given.flags, **given.settings)
    from dist_int8.checkpoint import is_int8, resolve_model, writer

    folder = resolve_model(options.model, settings.revision, allow_pickle=settings.allow_pickle)
    as_it_is = options.format == "bitsandbytes" or is_int8(folder, settings.allow_pickle)
    _check_point(given, as_it_is)
    numerics = settings.numerics
    calibrate = given.settings.get("calibrate")
    if calibrate is None:
        calibrate = "off" if as_it_is or columns is not None else "random"
    job = writer.quantize(
        folder,
        options.out,
        target="bitsandbytes" if options.format == "bitsandbytes" else "dist_int8",
        skip=settings.skipped,
        embedding_int8=settings.embedding == "int8",
        hot_columns=columns,
        calibrate=calibrate,
        num_hot_columns=numerics.num_hot_columns,
        down_hot_columns=numerics.down_hot_columns,
        rotation=settings.rotation if as_it_is else numerics.rotation,
        accuracy=settings.accuracy,
        shard_bytes=shard_bytes,
        device=options.device,
        allow_pickle=settings.allow_pickle,
    )
    _run(job, "quantizing", options.verify, given.quiet)


def _check_point(given: Given, as_it_is: bool) -> None:
    """Refuses a named point for what has none: int8 weights, and bitsandbytes' form."""
    if as_it_is and "accuracy" in given.settings:
        raise ValueError(
            "dist-int8 quantize:accuracy: --accuracy must be left out for bitsandbytes and for a "
            f"checkpoint that is int8 already, got {given.settings['accuracy']}; start from the "
            "floating-point checkpoint and write the dist_int8 format"
        )


@takes(DequantizeOptions, [*_SOURCE_FLAGS, *log_flags(None)])
def dequantize(options: DequantizeOptions, given: Given) -> None:
    """Write a floating-point checkpoint from an int8 one, ours or bitsandbytes' in any layout.

    dist-int8 dequantize ./llama-int8 ./llama-again --dtype bfloat16
    """
    shard_bytes = _parse_shard_size("dequantize", options.shard_size)
    settings = load_settings(source="dist-int8 dequantize", flags=given.flags, **given.settings)
    from dist_int8.checkpoint import resolve_model, writer

    job = writer.dequantize(
        resolve_model(options.model, settings.revision, allow_pickle=settings.allow_pickle),
        options.out,
        dtype=options.dtype,
        shard_bytes=shard_bytes,
        device=options.device,
        allow_pickle=settings.allow_pickle,
    )
    _run(job, "dequantizing", options.verify, given.quiet)


@takes(VerifyOptions, log_flags(None))
def verify(options: VerifyOptions, given: Given) -> None:
    """Compare every file of a checkpoint with its sha256 sum, as `sha256sum -c SHA256SUMS` does.

    dist-int8 verify ./llama-int8
    """
    _verify(options.folder, given.quiet)


def _run(job: Any, verb: str, verify: bool, quiet: bool) -> None:
    """Writes the checkpoint with a bar on stderr, and verifies it if asked."""

    def note(line: str) -> None:
        if not quiet:
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)

    with _open_bar(verb, job.num_bytes_read + job.num_bytes, quiet) as progress:
        is_new = job.run(progress, note)
    if not is_new:
        note(f"{job.out}: complete already")
    if verify:
        _verify(job.out, quiet, told=not quiet)
    elif not quiet:
        shards = count(job.num_shards, "file")
        typer.echo(f"{job.out}: {shards}, {count(job.num_bytes, 'byte')} of tensors")


def _verify(folder: Path, quiet: bool, told: bool = True) -> None:
    """Verifies with a bar unless `quiet`; the verdict is on stdout unless nobody is `told`."""
    from dist_int8.checkpoint.writer import manifest

    with _open_bar("verifying", manifest.num_bytes(folder), quiet) as progress:
        num_files = manifest.verify(folder, progress)
    are = "is as it was" if num_files == 1 else "are as they were"
    if told:
        typer.echo(f"{folder}: {count(num_files, 'file')} {are} written")


@contextlib.contextmanager
def _open_bar(verb: str, num_bytes: int, quiet: bool) -> Iterator[Callable[[int], object]]:
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


def _parse_shard_size(command: str, text: str) -> int:
    try:
        return parse_byte_size(text)
    except ValueError as error:
        raise ValueError(f"dist-int8 {command}:shard_size: --shard-size {error}") from None


def _refuse_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("the same name twice")
    return made


def _read_hot_columns(path: Path) -> dict[str, list[int]]:
    try:
        columns = json.loads(path.read_text(), object_pairs_hook=_refuse_doubled)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"{path}: hot_columns must be a JSON file, got {reason}; check the path and what is "
            "in it"
        ) from None
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
