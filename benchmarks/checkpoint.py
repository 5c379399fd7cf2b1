"""How much host memory and time do loading, quantizing and reloading a checkpoint take?

    python benchmarks/checkpoint.py [--size 4GB] [--folder /tmp/checkpoint-benchmark] [--repeats 3]

transformers writes a random bf16 Llama in several shards. Each step then runs in its own process,
after its files were dropped from the page cache ("cold") or read ("warm"). Peak host memory is
VmHWM minus VmRSS before the step, minus the bytes of the stage that stays (here on the CPU).
Correctness first: the int8 checkpoint gives the same stage as the floating-point one, and a flipped
bit is caught.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from results import add_json, write_result
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from dist_int8.checkpoint import CheckpointReader, StageFormat, load_stage
from dist_int8.checkpoint.writer import manifest, quantize
from dist_int8.config import parse_byte_size
from dist_int8.models import StageSlice, describe, load_config

_BLOCK = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="4GB", help="size of the floating-point checkpoint")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/checkpoint-benchmark"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--kills",
        type=int,
        default=20,
        help="number of times to kill `quantize` at a random moment",
    )
    add_json(parser)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.step:
        print(json.dumps(STEPS[args.step[0]](Path(args.step[1]))))
        return
    source, int8 = args.folder / "model", args.folder / "int8"
    make(source, parse_byte_size(args.size))
    check(source, int8)
    figures = {"size": args.size, "threads": args.threads, "repeats": args.repeats}
    figures |= {"model_bytes": size(source), "int8_bytes": size(int8)}
    figures |= {"largest_tensor_bytes": largest_tensor(source)}
    steps = (
        ("plain read", "read", source),
        ("load, quantizing", "load", source),
        ("quantize to disk", "quantize", source),
        ("plain read of int8", "read", int8),
        ("memory of the stage", "memory", int8),
        ("load int8", "load", int8),
        ("verify int8", "verify", int8),
    )
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(
        args.repeats
    ):  # interleaved: the disks of virtual machines vary from minute to minute
        for cache in ("cold", "warm"):
            for name, step, folder in steps:
                run = measure(step, folder, cache, args.threads)
                runs.setdefault(f"{name}, {cache}", []).append(run)
                print(f"{name}, {cache}: {run['seconds']:.2f} s", flush=True)
    rows = {
        name: {
            "seconds": statistics.median(run["seconds"] for run in of_step),
            "peak_bytes": max(run["peak_bytes"] for run in of_step),
            "all_seconds": [round(run["seconds"], 3) for run in of_step],
        }
        for name, of_step in runs.items()
    }
    for name, row in rows.items():
        print(f"{name}: {row['seconds']:.2f} s, {row['peak_bytes'] / 1e6:.1f} MB")
    if args.kills:
        figures["kills"] = killed_at_random(source, args.kills)
    for run in rows.values():
        assert run["peak_bytes"] <= 2 * figures["largest_tensor_bytes"], run
    write_result("checkpoint", figures | {"steps": rows}, args.json)


def make(folder: Path, num_bytes: int) -> None:
    """Writes a Llama of about `num_bytes` in eight shards."""
    if (folder / "config.json").is_file():
        return
    hidden, inner, vocab = (2560, 6912, 32000) if num_bytes > 10**9 else (512, 1408, 8000)
    block = 4 * hidden**2 + 3 * hidden * inner
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=max(1, (num_bytes // 2 - 2 * vocab * hidden) // block),
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder, max_shard_size=f"{num_bytes // 7_000_000}MB")


def check(source: Path, int8: Path) -> None:
    """Checks that the int8 checkpoint gives the same stage and a flipped bit is caught."""
    shutil.rmtree(int8, ignore_errors=True)
    quantize(source, int8, shard_bytes=size(source) // 16).run()
    spec = describe(load_config(source))
    last = StageSlice(range(spec.num_blocks - 2, spec.num_blocks), first=False, last=True)
    stages = [load_stage(folder, spec, last) for folder in (source, int8)]
    one, two = (stage.state_dict() for stage in stages)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    manifest.verify(int8)
    shard = sorted(int8.glob("*.safetensors"))[0]
    for _ in range(2):  # flip the bit, then flip it back
        with shard.open("r+b") as file:
            file.seek(-12345, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        try:
            manifest.verify(int8)
            found = False
        except ValueError as error:
            found = shard.name in str(error)
        assert found == (_ == 0), "a flipped bit must be caught, and only that"


def measure(step: str, folder: Path, cache: str, threads: int) -> dict[str, float]:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(_BLOCK):
                    pass
    command = [sys.executable, __file__, "--threads", str(threads), "--step", step, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def killed_at_random(source: Path, num_kills: int) -> dict[str, int]:
    """Kills `dist-int8 quantize` at random moments and runs it again until it completes.

    After each kill OUT is either absent or complete. At the end it equals that of an undisturbed
    run byte for byte, including hot columns.
    """
    out = source.parent / "killed"
    aside = out.with_name(f".{out.name}.partial")
    command = [sys.executable, "-m", "dist_int8", "quantize", str(source), str(out), "--quiet"]
    command += ["--shard-size", str(size(source) // 16)]
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(command, check=True)
    duration = time.perf_counter() - started
    expected = (out / manifest.NAME).read_bytes()
    names = {path.name for path in out.iterdir()}
    shutil.rmtree(out)
    chance = random.Random(0)
    counts = {"kills": 0, "while writing": 0, "runs that were through": 0, "most shards kept": 0}
    while counts["kills"] < num_kills:
        process = subprocess.Popen(command)
        time.sleep(chance.uniform(0, duration))
        process.kill()
        counts["kills"] += process.wait() != 0
        kept = len(list((aside / "done").glob("*.safetensors")))
        counts["while writing"] += len(list((aside / "model").glob("*.writing"))) > 0
        counts["most shards kept"] = max(counts["most shards kept"], kept)
        try:
            load_config(aside / "model")
            CheckpointReader(aside / "model")
        except ValueError:
            pass  # cannot be loaded
        else:  # between the last file and the rename
            manifest.verify(aside / "model")
        if out.exists():
            counts["runs that were through"] += 1
            assert (out / manifest.NAME).read_bytes() == expected
            manifest.verify(out)
            shutil.rmtree(out)
    subprocess.run(command, check=True)
    assert (out / manifest.NAME).read_bytes() == expected
    manifest.verify(out)
    assert {path.name for path in out.iterdir()} == names
    shutil.rmtree(out)
    print(f"killed: {counts}")
    return counts


def read(folder: Path) -> dict[str, float]:
    buffer = bytearray(_BLOCK)
    with Watch() as watch:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return watch.figures(0)


def load(folder: Path) -> dict[str, float]:
    spec = describe(load_config(folder))
    with Watch() as watch:
        stage = load_stage(
            folder,
            spec,
            StageSlice.whole(spec),
            StageFormat(dtype=torch.bfloat16, max_tokens=2048),
        )
    tensors = [*stage.state_dict().values(), *stage.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return watch.figures(sum(storages.values()))


def quantize_step(folder: Path) -> dict[str, float]:
    out = folder.parent / "again"
    shutil.rmtree(out, ignore_errors=True)
    with Watch() as watch:
        quantize(folder, out, shard_bytes=size(folder) // 16).run()
    shutil.rmtree(out)
    return watch.figures(0)


def verify(folder: Path) -> dict[str, float]:
    with Watch() as watch:
        manifest.verify(folder)
    return watch.figures(0)


def memory(folder: Path) -> dict[str, float]:
    """Touches as much fresh memory as the stage takes: a lower bound on virtual machines."""
    with Watch() as watch:
        stays = [torch.ones(1 << 24, dtype=torch.uint8) for _ in range(size(folder) >> 24)]
    return watch.figures(sum(tensor.nbytes for tensor in stays))


STEPS = {"read": read, "memory": memory, "load": load, "quantize": quantize_step, "verify": verify}


class Watch:
    """Measures time, and peak resident memory above that at the start."""

    def __enter__(self) -> "Watch":
        torch.ones(1 << 20).round()  # torch allocates once for its threads; that does not count
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS, proc(5)
        self._before = _status("VmRSS")
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._started
        self._peak = _status("VmHWM")

    def figures(self, num_bytes_that_stay: int) -> dict[str, float]:
        peak = self._peak - self._before - num_bytes_that_stay
        return {"seconds": self._seconds, "peak_bytes": peak}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must have {key}")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def largest_tensor(folder: Path) -> int:
    largest = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open handle is not a mapping
                largest = max(largest, 2 * torch.Size(file.get_slice(name).get_shape()).numel())
    return largest


if __name__ == "__main__":
    main()
