"""A checkpoint folder that appears whole or not at all, and survives a kill while it is made.

    .OUT.partial/          beside OUT
        lock               held while a process works here
        job.json           what is being made, from which files
        hot_columns.json   what calibration found
        done/<shard>       sha256 of a finished shard
        model/             becomes OUT by one rename, when all of it is on the disk

A shard is written under another name, flushed, renamed, and only then noted as done; a rerun of
the same job takes the shards that are noted. The index comes last.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_int8.checkpoint.reader import INDEX
from dist_int8.checkpoint.writer import manifest
from dist_int8.checkpoint.writer.shards import Group, shard_name, write_shard

CONFIG = "config.json"
HOT_COLUMNS = "hot_columns.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HEADROOM = 1 << 20  # headers and directories


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def write_folder(
    out: Path,
    config: Mapping[str, Any],
    small_files: Sequence[Path],
    shards: Sequence[Sequence[Group]],
    job: Mapping[str, Any],
    progress: Callable[[int], object],
    note: Callable[[str], object],
    prepare: Callable[[Path], object] = lambda aside: None,
) -> bool:
    """Makes the folder `out`; returns False if it is there already, made with the same config.

    Args:
        out: must not exist, be empty, or hold the same checkpoint.
        config: config.json.
        small_files: copied: tokenizer and so on.
        shards: the tensors of each file.
        job: what an interrupted run must have in common with this one to be continued.
        progress: called with the bytes of every tensor slice written or taken over.
        note: called with a line for the user.
        prepare: called with the folder aside before the first shard is made; a rerun finds there
            what it left.

    Raises:
        ValueError: `out` holds something else, or another process is at it.
        RuntimeError: the disk is, or would become, full. What is finished stays for a rerun.
    """
    out = out.absolute()
    if not out.parent.is_dir():
        raise ValueError(f"{out}: its parent must be a folder, got none; create {out.parent}")
    aside = out.parent / f".{out.name}.partial"
    index = _make_index(shards)
    if _is_made(out, config, index):
        shutil.rmtree(aside, ignore_errors=True)  # killed between the rename and its end
        return False
    with _locked(aside):
        if _is_made(out, config, index):  # by the process that we waited for
            return False
        _begin(aside, job, note)
        with _full_disk_in_one_line(out):
            prepare(aside)
            _write(out, aside, config, small_files, shards, index, progress)
    return True


def _make_index(shards: Sequence[Sequence[Group]]) -> dict[str, Any]:
    """The index file: which tensor is in which shard."""
    return {
        "metadata": {"total_size": sum(group.num_bytes for groups in shards for group in groups)},
        "weight_map": {
            output.name: shard_name(number, len(shards))
            for number, groups in enumerate(shards)
            for group in groups
            for output in group.outputs
        },
    }


def _is_made(out: Path, config: Mapping[str, Any], index: Mapping[str, Any]) -> bool:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    what = "something else"
    if out.is_dir() and all((out / name).is_file() for name in (CONFIG, manifest.NAME, INDEX)):
        if (out / CONFIG).read_bytes() == as_json(config):
            if (out / INDEX).read_bytes() == as_json(index):
                return True
            what = "the same model with other tensors or another shard size"
        else:
            what = "a checkpoint of another model or with other settings"
    raise ValueError(
        f"{out}: OUT must be a new folder or the same checkpoint, got one that holds {what}; "
        "name another or remove it"
    )


@contextlib.contextmanager
def _locked(aside: Path) -> Iterator[None]:
    """The folder aside, for this process alone; the kernel lets go when the process ends."""
    try:
        aside.mkdir(exist_ok=True)
        opened = (aside / "lock").open("w")
    except OSError as error:
        raise ValueError(
            f"{aside}: OUT must be in a folder that can be written, got {error.strerror}; name "
            "another"
        ) from None
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{aside}: one process must work here at a time, got a second; wait for the first"
            ) from None
        yield


def _begin(aside: Path, job: Mapping[str, Any], note: Callable[[str], object]) -> None:
    path = aside / "job.json"
    begun = (aside / "model").is_dir()
    if begun and not (path.is_file() and path.read_bytes() == as_json(job)):
        note(f"{aside}: left by another job, starting over")
        begun = False
    if not begun:
        for name in ("model", "done"):
            shutil.rmtree(aside / name, ignore_errors=True)
        (aside / HOT_COLUMNS).unlink(missing_ok=True)
        write_file(path, as_json(job))
        (aside / "done").mkdir()
        (aside / "model").mkdir()
    elif num_done := len(list((aside / "done").glob("*.safetensors"))):
        note(f"{aside}: continuing behind {num_done} finished shard(s)")


def _write(
    out: Path,
    aside: Path,
    config: Mapping[str, Any],
    small_files: Sequence[Path],
    shards: Sequence[Sequence[Group]],
    index: Mapping[str, Any],
    progress: Callable[[int], object],
) -> None:
    model = aside / "model"
    names = [shard_name(index, len(shards)) for index in range(len(shards))]
    sizes = {
        name: sum(group.num_bytes for group in groups)
        for name, groups in zip(names, shards, strict=True)
    }
    done = {name: aside / "done" / name for name in names}
    for unfinished in model.glob("*.writing"):
        unfinished.unlink()
    needed = sum(size for name, size in sizes.items() if not done[name].is_file())
    needed += sum(path.stat().st_size for path in small_files) + _HEADROOM
    free = shutil.disk_usage(aside).free
    if needed > free:
        if not any(path.is_file() for path in done.values()):
            shutil.rmtree(aside)  # nothing there that a rerun could take over
        raise RuntimeError(
            f"{out}: disk must have {needed} bytes free, got {free}; free "
            f"{needed - free} bytes or name a folder on another disk"
        )
    sums = {}
    for name, groups in zip(names, shards, strict=True):
        if not done[name].is_file():
            writing = model / f"{name}.writing"
            sum_of_file = write_shard(writing, [_reporting(group, progress) for group in groups])
            writing.rename(model / name)
            _sync(model)
            write_file(done[name], sum_of_file.encode())
        else:
            progress(sizes[name])
        sums[name] = done[name].read_text()
    files = {path.name: path.read_bytes() for path in small_files}
    files |= {CONFIG: as_json(config), INDEX: as_json(index)}
    sums |= {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    last = files.pop(INDEX)
    for name, content in files.items():
        write_file(model / name, content)
    write_file(model / manifest.NAME, manifest.as_text(sums).encode())
    write_file(model / INDEX, last)
    model.rename(out)  # replaces an empty folder
    _sync(out.parent)
    shutil.rmtree(aside)


def _reporting(group: Group, progress: Callable[[int], object]) -> Group:
    def make() -> Iterator[Any]:
        for index, first, rows in group.make():
            yield index, first, rows
            progress(rows.nbytes)

    return Group(group.outputs, make)


def write_file(path: Path, content: bytes) -> None:
    """On the disk under its name, whole, or not there."""
    writing = path.with_name(f"{path.name}.writing")
    with writing.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    writing.rename(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _full_disk_in_one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        for unfinished in (out.parent / f".{out.name}.partial" / "model").glob("*.writing"):
            unfinished.unlink()
        raise RuntimeError(
            f"{out}: disk must have room for the checkpoint, got {error.strerror}; free some and "
            "run the same command again, it continues behind the last finished shard"
        ) from None
