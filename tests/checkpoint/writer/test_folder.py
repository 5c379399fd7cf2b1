"""A killed `quantize`, one on a full disk, or two at once: whole or absent, finished by a rerun."""

import fcntl
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from dist_int8.checkpoint import CheckpointReader
from dist_int8.checkpoint.writer import manifest, quantize

SHARD = 40_000  # three files


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_child(work):
    """Run `work` in a copy of this process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except RuntimeError:
            os._exit(3)
        except BaseException:
            os._exit(4)
        os._exit(0)
    return pid


def assert_whole_or_absent(out, expected):
    """Nothing that loads is anything but the whole; what is aside has no index."""
    if out.exists():
        assert contents(out) == expected
    aside = out.parent / f".{out.name}.partial" / "model"
    if aside.exists() and not (aside / "model.safetensors.index.json").exists():
        with pytest.raises(ValueError):
            CheckpointReader(aside)
    for name in manifest.read(aside) if (aside / manifest.NAME).exists() else ():
        if name != "model.safetensors.index.json":
            assert (aside / name).read_bytes() == expected[name]


@pytest.fixture
def job(originals, tmp_path, monkeypatch):
    """A function: where to -> the job; and the content of a clean run."""
    # Slow, and needed only in a power failure.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def make(out):
        return quantize(originals["llama"], out, shard_bytes=SHARD)

    make(tmp_path / "clean").run()
    return make, contents(tmp_path / "clean")


def test_a_run_killed_at_any_flush_is_finished_by_a_rerun(job, tmp_path):
    """SIGKILL before the n-th flush to the disk, for every n until none is left."""
    make, expected = job
    num_kills = 0
    for step in range(200):
        out = tmp_path / f"out{step}"

        def killed(step=step, out=out):
            left = [step]

            def fsync(descriptor):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

            os.fsync = fsync
            make(out).run()

        _, status = os.waitpid(in_child(killed), 0)
        assert_whole_or_absent(out, expected)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        num_kills += 1
        shards_before = list((tmp_path / f".{out.name}.partial" / "done").glob("*.safetensors"))
        expects_note = bool(shards_before) and not out.exists()
        notes = []
        make(out).run(note=notes.append)
        assert bool(notes) == expects_note  # "continuing after ..."
        assert contents(out) == expected
        assert not (tmp_path / f".{out.name}.partial").exists()
        shutil.rmtree(out)
    assert num_kills > 3 * len(list(tmp_path.glob("clean/*.safetensors")))


def test_runs_killed_at_random_times_leave_nothing_half_done(job, tmp_path):
    make, expected = job
    started = time.perf_counter()
    make(tmp_path / "timed").run()
    duration = time.perf_counter() - started
    chance = random.Random(0)
    num_killed = 0
    out = tmp_path / "out"
    for _ in range(20):
        pid = in_child(lambda: make(out).run())
        time.sleep(chance.uniform(0, 1.2 * duration))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        num_killed += os.WIFSIGNALED(status)
        assert_whole_or_absent(out, expected)
        if out.exists():
            shutil.rmtree(out)
    assert num_killed > 3
    make(out).run()
    assert contents(out) == expected


def test_a_disk_without_room_is_refused_before_the_first_byte(job, tmp_path, monkeypatch):
    make, _ = job
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RuntimeError, match=r"disk must have \d+ bytes free, got 1000; free \d+"):
        make(tmp_path / "out").run()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_a_disk_that_fills_up_keeps_what_is_finished(job, tmp_path):
    make, expected = job
    sizes = [len(content) for name, content in expected.items() if name.endswith("safetensors")]

    def crowded_out():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 100, resource.RLIM_INFINITY))
        make(tmp_path / "out").run()

    _, status = os.waitpid(in_child(crowded_out), 0)
    assert os.WEXITSTATUS(status) == 3  # the RuntimeError
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.writing"))
    make(tmp_path / "out").run()
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("room", [0, 50])
def test_a_disk_without_room_for_the_first_file_is_named(job, tmp_path, room):
    make, expected = job
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=f"{tmp_path}/out: disk must have room"):
            make(tmp_path / "out").run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    make(tmp_path / "out").run()
    assert contents(tmp_path / "out") == expected


def test_a_name_that_the_system_refuses_is_in_the_error(job, tmp_path):
    make, _ = job
    with pytest.raises(ValueError, match=r"x+\.partial: OUT must be in a folder .*File name too l"):
        make(tmp_path / ("x" * 250)).run()
    with pytest.raises(RuntimeError, match=r"y+: must be a file or folder .*File name too long"):
        make(tmp_path / ("y" * 300) / "out").run()


def test_a_second_process_is_refused(job, tmp_path):
    make, _ = job
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="one process must work here at a time"):
            make(tmp_path / "out").run()
    assert make(tmp_path / "out").run()


def test_what_another_job_left_is_started_over(job, originals, tmp_path):
    make, expected = job
    aside = tmp_path / ".out.partial"
    pid = in_child(
        lambda: quantize(originals["llama"], tmp_path / "out", skip=[]).run(
            lambda num_bytes: os.kill(os.getpid(), signal.SIGKILL)
        )
    )
    os.waitpid(pid, 0)
    assert (aside / "job.json").is_file()
    notes = []
    make(tmp_path / "out").run(note=notes.append)
    assert notes == [f"{aside}: left by another job, starting over"]
    assert contents(tmp_path / "out") == expected


def test_out_must_have_a_parent_and_may_be_an_empty_folder(job, tmp_path):
    make, expected = job
    with pytest.raises(ValueError, match="its parent must be a folder"):
        make(tmp_path / "no" / "out").run()
    with pytest.raises(ValueError, match="a folder that can be written"):
        make(Path("/proc/out")).run()
    (tmp_path / "out").mkdir()
    make(tmp_path / "out").run()
    assert contents(tmp_path / "out") == expected


def test_a_finished_folder_made_with_other_options_is_refused(job, originals, tmp_path):
    make, expected = job
    make(tmp_path / "out").run()
    for options, part in (
        ({"shard_bytes": 2 * SHARD}, "another shard size"),
        ({"shard_bytes": SHARD, "skip": []}, "other settings"),
    ):
        with pytest.raises(ValueError, match=part):
            quantize(originals["llama"], tmp_path / "out", **options).run()
    assert contents(tmp_path / "out") == expected
