"""How fast is a model on CPUs when other processes take the cores?

    python benchmarks/contention.py [--model FOLDER] [--threads 2] [--repeats 5]

Cells: decode at batch 1 and 8, prefill of 512 tokens. Situations: idle; one and two busy processes
beside as many threads as --threads; a CPU quota of one core for them; and two stages of one thread
each, idle and beside one busy process. In every repeat each cell is measured once in each
situation; medians, and shares of the idle figure. Correctness first: every situation gives the
tokens of the idle one. The quota needs a cgroup (v1 or v2) that may be written, as root has in a
virtual machine; without one its row is left out, which is said. --libraries compares compiled
libraries (DIST_INT8_LIBRARY) in one run, for figures before and after a change.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from results import folder_of, make_parser, write_result

CELLS = ("decode 1", "decode 8", "prefill 512")
BUSY = [sys.executable, "-c", "while True: pass"]
# (name, stages, busy processes, quota of one core); a name that repeats "idle" is its reference
SITUATIONS = (
    ("idle", 1, 0, False),
    ("one neighbour", 1, 1, False),
    ("two neighbours", 1, 2, False),
    ("quota of one core", 1, 0, True),
    ("two stages, idle", 2, 0, False),
    ("two stages, one neighbour", 2, 1, False),
)
PERIOD_US = 100_000


class Quota:
    """A cgroup below that of a process, into which it moves while its CPU quota is limited."""

    def __init__(self, pid):
        self.pid = pid
        self.parent = find_cgroup(pid)
        self.folder = self.parent / f"dist_int8_contention_{pid}"
        self.folder.mkdir()

    @contextmanager
    def limited(self, cores):
        quota = int(cores * PERIOD_US)
        if (self.folder / "cpu.max").exists():
            (self.folder / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        else:
            (self.folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self.folder / "cpu.cfs_quota_us").write_text(str(quota))
        (self.folder / "cgroup.procs").write_text(str(self.pid))
        try:
            yield
        finally:
            (self.parent / "cgroup.procs").write_text(str(self.pid))

    def remove(self):
        self.folder.rmdir()


def find_cgroup(pid):
    """Returns the folder of the process's cgroup with the CPU controller, of version 1 or 2."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return Path("/sys/fs/cgroup/cpu" + path)
    return Path("/sys/fs/cgroup" + path)


class Worker:
    """A process with a loaded model that measures one cell at a time and sleeps in between."""

    def __init__(self, folder, stages, threads, library):
        environment = dict(os.environ)
        if library:
            environment["DIST_INT8_LIBRARY"] = str(Path(library).resolve())
        command = [sys.executable, __file__, "--worker", folder, str(stages), str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("contention: a worker ended; its error is above")
        return json.loads(line)

    def measure(self, cell):
        """Returns tokens per second and the tokens."""
        self.process.stdin.write(cell + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def work(folder, stages, threads):
    """Loads a model, then answers cells from stdin with JSON lines."""
    import dist_int8

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    with dist_int8.load(
        folder,
        devices=["cpu"] * stages,
        threads_per_stage=threads,
        max_sequences=8,
        max_tokens=640,
        progress=False,
    ) as model:
        rows = torch.randint(1000, 20000, (8, 512), generator=generator).tolist()
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            kind, size = line.split()
            print(json.dumps(measure_cell(model, rows, kind, int(size))), flush=True)


def measure_cell(model, rows, kind, size):
    """Returns tokens per second and the tokens of one cell."""
    if kind == "decode":
        prompts = [row[:32] for row in rows[:size]]
        answer = model.generate(prompts, max_new_tokens=32, ignore_eos=True)
        return answer[0].decode_tokens_per_s, [one.token_ids for one in answer]
    began = time.perf_counter()
    answer = model.generate([rows[0][:size]], max_new_tokens=1, ignore_eos=True)
    return size / (time.perf_counter() - began), [one.token_ids for one in answer]


def start_neighbours(count):
    """Starts busy processes in sessions of their own, stopped until they are wanted."""
    neighbours = [subprocess.Popen(BUSY, start_new_session=True) for _ in range(count)]
    time.sleep(0.5)
    for neighbour in neighbours:
        neighbour.send_signal(signal.SIGSTOP)
    return neighbours


@contextmanager
def busy(neighbours):
    for neighbour in neighbours:
        neighbour.send_signal(signal.SIGCONT)
    time.sleep(0.1)
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.send_signal(signal.SIGSTOP)


def make_quota(worker):
    try:
        return Quota(worker.process.pid)
    except OSError as error:
        print(f"quota of one core: left out, {error}", flush=True)
        return None


def measure(workers, quotas, neighbours, cells, repeats):
    """Samples of tokens per second: [library][situation][cell]."""
    samples, tokens = {}, {}
    for repeat in range(repeats + 1):  # the first warms up
        for name, stages, num_busy, is_limited in SITUATIONS:
            for library in quotas:
                worker, quota = workers[library, stages], quotas[library]
                if is_limited and quota is None:
                    continue
                for cell in cells:
                    with busy(neighbours[:num_busy]):
                        if is_limited:
                            with quota.limited(1):
                                speed, answer = worker.measure(cell)
                        else:
                            speed, answer = worker.measure(cell)
                    wanted = tokens.setdefault(cell, answer)
                    assert answer == wanted, f"{name}, {cell}: other tokens than alone"
                    if repeat:
                        found = samples.setdefault(library, {}).setdefault(name, {})
                        found.setdefault(cell, []).append(speed)
                        print(f"{library} {name}, {cell}: {speed:.1f} tokens/s", flush=True)
    return samples


def summarize(situations):
    """Medians, and their share of the idle figure with as many stages."""
    figures = {}
    for name, cells in situations.items():
        idle = situations["two stages, idle" if name.startswith("two stages") else "idle"]
        for cell, speeds in cells.items():
            median = statistics.median(speeds)
            share = median / statistics.median(idle[cell])
            figures.setdefault(name, {})[cell] = {"tokens_per_s": median, "share": share}
    return figures


def main():
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, default=2, help="of the model in one process")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cells", nargs="*", default=CELLS, choices=CELLS)
    parser.add_argument("--libraries", nargs="*", default=[""], metavar="FILE")
    args = parser.parse_args()
    folder = folder_of(args)
    neighbours, workers, quotas = start_neighbours(2), {}, {}
    try:
        for library in args.libraries:
            workers[library, 1] = Worker(folder, 1, args.threads, library)
            workers[library, 2] = Worker(folder, 2, 1, library)
            quotas[library] = make_quota(workers[library, 1])
        samples = measure(workers, quotas, neighbours, args.cells, args.repeats)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
        for worker in workers.values():
            worker.close()
        for quota in quotas.values():
            if quota is not None:
                quota.remove()
    figures = {library or "default": summarize(each) for library, each in samples.items()}
    for library, situations in figures.items():
        print(library)
        for name, cells in situations.items():
            row = ", ".join(
                f"{cell}: {one['tokens_per_s']:7.1f} ({one['share']:4.0%})"
                for cell, one in cells.items()
            )
            print(f"  {name:26s} {row}")
    setting = {"threads": args.threads, "repeats": args.repeats}
    write_result("contention", {**setting, "libraries": figures}, args.json, args.raw)


if __name__ == "__main__":
    main()
