"""A checkpoint folder that appears whole or not at all, and survives a kill while it is made.

It is made aside (`aside.py`). A shard is written under another name, flushed, renamed, and only
then noted as done; a rerun of the same job takes over the shards that are noted. The index comes
last.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_int8.checkpoint.weight_files import INDEX
from dist_int8.checkpoint.writer import manifest
from dist_int8.checkpoint.writer.aside import CONFIG, Aside, as_json
from dist_int8.checkpoint.writer.durable import UNFINISHED, write_file
from dist_int8.checkpoint.writer.plan import RewritePlan
from dist_int8.checkpoint.writer.recipe import Recipe
from dist_int8.checkpoint.writer.shards import Group, name_shard, write_shard
from dist_int8.checkpoint.writer.tensors import Made

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HEADROOM = 1 << 20  # headers and directories

Make = Callable[[Recipe], Made]
Progress = Callable[[int], object]


def write_folder(
    plan: RewritePlan,
    prepare: Callable[[Aside], Make],
    progress: Progress,
    note: Callable[[str], object],
) -> bool:
    """Makes the folder of a plan; returns False if it is there already, made with the same config.

    Args:
        plan: its `out` must not exist, be empty, or hold the same checkpoint.
        prepare: called with the folder aside before the first shard is made; a rerun finds there
            what it left. Returns what makes the tensors of a recipe.
        progress: called with the bytes of every tensor slice written or taken over.
        note: called with a line for the user.

    Raises:
        ValueError: `out` holds something else, or another process is at work there.
        RuntimeError: the disk is, or would become, full. What is finished stays for a rerun.
    """
    out = plan.out.absolute()
    aside = Aside(out)
    with _errors_in_one_line(out, aside):
        if not out.parent.is_dir():
            raise ValueError(f"{out}: its parent must be a folder, got none; create {out.parent}")
        return _write(plan, out, aside, prepare, progress, note)


def _write(
    plan: RewritePlan,
    out: Path,
    aside: Aside,
    prepare: Callable[[Aside], Make],
    progress: Progress,
    note: Callable[[str], object],
) -> bool:
    index = _make_index(plan.shards)
    if _is_made(out, plan.config, index):
        aside.remove()  # killed between the rename and its end
        return False
    with aside.lock():
        if _is_made(out, plan.config, index):  # by the process that we waited for
            return False
        aside.begin(plan.identity, note)
        make = prepare(aside)
        _check_free_space(out, aside, plan)
        sums = _write_shards(aside, plan.shards, make, progress)
        _write_small_files(aside, plan, index, sums)
        aside.become(out)
    return True


def _make_index(shards: Sequence[Sequence[Recipe]]) -> dict[str, Any]:
    """Makes the index file: which tensor is in which shard."""
    return {
        "metadata": {"total_size": sum(recipe.num_bytes for shard in shards for recipe in shard)},
        "weight_map": {
            output.name: name_shard(number, len(shards))
            for number, shard in enumerate(shards)
            for recipe in shard
            for output in recipe.outputs
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


def _name_shards(shards: Sequence[Sequence[Recipe]]) -> dict[str, Sequence[Recipe]]:
    return {name_shard(number, len(shards)): shard for number, shard in enumerate(shards)}


def _check_free_space(out: Path, aside: Aside, plan: RewritePlan) -> None:
    shards = _name_shards(plan.shards)
    unfinished = [shard for name, shard in shards.items() if aside.get_sum(name) is None]
    needed = sum(recipe.num_bytes for shard in unfinished for recipe in shard)
    needed += sum(path.stat().st_size for path in plan.small_files) + _HEADROOM
    free = shutil.disk_usage(aside.path).free
    if needed <= free:
        return
    if len(unfinished) == len(shards):
        aside.remove()  # nothing there that a rerun could take over
    raise RuntimeError(
        f"{out}: disk must have {needed} bytes free, got {free}; free "
        f"{needed - free} bytes or name a folder on another disk"
    )


def _write_shards(
    aside: Aside, shards: Sequence[Sequence[Recipe]], make: Make, progress: Progress
) -> dict[str, str]:
    """Writes or takes over every shard; returns their sha256 sums by name."""

    def make_reporting(recipe: Recipe) -> Made:
        for index, first, rows in make(recipe):
            yield index, first, rows
            progress(rows.nbytes)

    sums = {}
    for name, shard in _name_shards(shards).items():
        sum_of_file = aside.get_sum(name)
        if sum_of_file is not None:
            progress(sum(recipe.num_bytes for recipe in shard))
        else:
            writing = aside.model / f"{name}{UNFINISHED}"
            groups = [Group(recipe.outputs, make_reporting(recipe)) for recipe in shard]
            sum_of_file = write_shard(writing, groups)
            aside.finish_shard(writing, name, sum_of_file)
        sums[name] = sum_of_file
    return sums


def _write_small_files(
    aside: Aside, plan: RewritePlan, index: Mapping[str, Any], sums: Mapping[str, str]
) -> None:
    """Writes the copies, config and manifest, and the index last."""
    files = {path.name: path.read_bytes() for path in plan.small_files}
    files |= {CONFIG: as_json(plan.config), INDEX: as_json(index)}
    sums = {**sums, **{name: hashlib.sha256(files[name]).hexdigest() for name in files}}
    last = files.pop(INDEX)
    for name, content in files.items():
        write_file(aside.model / name, content)
    write_file(aside.model / manifest.NAME, manifest.as_text(sums).encode())
    write_file(aside.model / INDEX, last)


@contextlib.contextmanager
def _errors_in_one_line(out: Path, aside: Aside) -> Iterator[None]:
    """Names the file in what the system says, which is often without it."""
    try:
        yield
    except BrokenPipeError:  # of whoever watches the progress
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise RuntimeError(
                f"{error.filename or out}: must be a file or folder that can be used, got "
                f"{error.strerror or error}; name another OUT or mend that one"
            ) from None
        with contextlib.suppress(OSError):
            aside.remove_unfinished()
        raise RuntimeError(
            f"{out}: disk must have room for the checkpoint, got {error.strerror}; free some and "
            "run the same command again, it continues after the last finished shard"
        ) from None
