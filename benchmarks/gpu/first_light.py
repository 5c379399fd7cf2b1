"""First light: everything worth knowing of a GPU that is there for some minutes, in one call.

    python3 benchmarks/gpu/first_light.py --list
    python3 benchmarks/gpu/first_light.py --bundle .gpu --out FOLDER --budget 540
    python3 benchmarks/gpu/first_light.py --bundle .gpu --out FOLDER --resume OTHER_FOLDER
    python3 benchmarks/gpu/first_light.py --out FOLDER --device cpu --small       # a rehearsal

Steps run in order of worth, each a process with a limit, all within the budget; what cannot end in
what is left of it is left out, and said so. Results are JSON lines that exist as soon as they are
known, so a call that is killed loses at most the step that was running; --resume goes on with those
of an earlier call. FOLDER gets at most five files: results.jsonl, first_light.log, tests.xml
(JUnit), profile.yaml and summary.txt. Exit status 0 if every step passed, else 1. Nothing is
installed: --bundle is a folder made by `make gpu-bundle`, with what a machine without network
lacks.
"""

import argparse
import datetime
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundle
import clocks
import junit
import process
import records
import report
from steps import HERE, ROOT, STEPS, Place, Step

SKIPPED = 77  # exit status of a step that has nothing to do here, as automake's tests have it
RESTART = 75  # of one that wants to be started again, behind what it has tried (cells.py)
MARGIN_S = 4.0  # of the budget, to end a step and to write down how it went
BREAKS = {
    "hang": "import time; print('hangs', flush=True); time.sleep(1e6)",
    "crash": "import os; print('crashes', flush=True); os.abort()",
    "overrun": "import time; print('takes too long', flush=True); time.sleep(1e6)",
}
HANG_S = 5
SHARES = 2.5  # times its share of what is left that a step may take, by its expected seconds
RESTART_S = 10.0  # without so much left, a step is not started again
OVER = ("passed", "failed", "crashed", "timed out", "skipped")  # statuses that --resume keeps


class FirstLight:
    """One call: runs steps within a budget and writes down how each went.

    Args:
        place: where they run.
        budget_s: seconds from now on, for all of them.
        environment: of their processes.
        broken: how a rehearsal breaks a step, by name (BREAKS).
    """

    def __init__(
        self, place: Place, budget_s: float, environment: dict[str, str], broken: dict[str, str]
    ) -> None:
        self.place, self.environment, self.broken = place, environment, broken
        self.deadline = time.monotonic() + budget_s
        self.records = records.Records(place.records, "first_light")
        self.log = process.Log(place.out / "first_light.log")

    def run(self, steps: Sequence[Step]) -> None:
        for number, step in enumerate(steps):
            left = self.deadline - time.monotonic() - MARGIN_S
            if left < step.least_s:
                why = f"{max(0.0, left):.0f} s of the budget are left, it needs {step.least_s}"
                self.say(step.name, status="not run", seconds=0.0, last_line=why)
            else:
                share = left * step.expected_s / sum(s.expected_s for s in steps[number:])
                self.run_step(self.as_rehearsed(step, left), left, SHARES * share)

    def run_step(self, step: Step, left_s: float, share_s: float) -> None:
        """Runs a step within its limit, and within its share unless that is too little for it.

        A step that hangs must not take the time of the steps after it.
        """
        limit = min(step.limit_s, left_s, max(share_s, SHARES * step.least_s))
        self.records.add("begin", name=step.name, limit_s=round(limit))
        self.log.begin(f"{step.name}: at most {limit:.0f} s")
        started, place = time.monotonic(), self.place
        deadline = started + limit
        with clocks.Clocks() as samples:
            ended = self.run_once(step, place, deadline)
            while ended.status == RESTART and deadline - time.monotonic() > RESTART_S:
                place = replace(place, skip_tried=place.skip_tried or "begin")
                ended = self.run_once(step, place, deadline)
        self.say(
            step.name,
            status=_status(ended.status, limit < step.limit_s),
            seconds=round(time.monotonic() - started, 1),
            last_line=ended.last_line,
            code=ended.status,
            clocks=samples.summary(),
        )

    def run_once(self, step: Step, place: Place, deadline: float) -> process.Ended:
        scratch = tempfile.TemporaryDirectory(prefix="first_light-", ignore_cleanup_errors=True)
        with scratch as name:
            made = Path(name, "junit.xml")
            command = [part.replace("{junit}", str(made)) for part in step.command(place)]
            environment = {**self.environment, "TMPDIR": name}
            limit = max(0.0, deadline - time.monotonic())
            ended = process.run(command, limit, environment, self.log, ROOT, Path(name))
            junit.add_suite(self.place.out / "tests.xml", made)
        return ended

    def say(self, name: str, **how: Any) -> None:
        self.records.add("end", name=name, **how)
        say(f"{name:16s} {how['status']:10s} {how['seconds']:6.1f} s   {how['last_line'][:90]}")

    def as_rehearsed(self, step: Step, left_s: float) -> Step:
        how = self.broken.get(step.name)
        if how is None:
            return step
        limit = {"hang": HANG_S, "overrun": int(left_s) + 1}.get(how, step.limit_s)
        least = limit if how == "overrun" else 0
        return replace(
            step,
            command=lambda _: [sys.executable, "-c", BREAKS[how]],
            limit_s=limit,
            least_s=least,
        )


def say(text: str) -> None:
    """Prints, and goes on where nobody reads any more."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _status(code: int | None, is_cut: bool) -> str:
    """How a step went; `is_cut`: the budget, not its own limit, would have ended it."""
    if code is None:
        return "cut short" if is_cut else "timed out"
    if code < 0:
        return "crashed"
    return {0: "passed", SKIPPED: "skipped"}.get(code, "failed")


def environment_of(bundle: Path | None, device: str) -> dict[str, str]:
    """What the steps' processes see: this tree first, then the bundle's packages and library."""
    paths = [str(ROOT), str(HERE)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "DIST_INT8_GPU_TESTS": device}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # of that machine; each takes its seconds
    environment.setdefault("OMP_NUM_THREADS", str(min(16, os.cpu_count() or 1)))
    if bundle is not None:
        paths.append(str(bundle / "site"))
        environment["DIST_INT8_LIBRARY"] = str(bundle / "_ops.so")
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def steps_to_run(only: Sequence[str], earlier: Sequence[dict[str, Any]]) -> list[Step]:
    """Those named, or all that an earlier call has not been through."""
    if only:
        return [step for step in STEPS if step.name in only]
    over = {r["name"] for r in earlier if r["kind"] == "end" and r["status"] in OVER}
    return [step for step in STEPS if step.name not in over]


def list_steps() -> str:
    lines = ["    step            expected   limit   why so long"]
    for number, step in enumerate(STEPS):
        lines.append(
            f"{number:3d} {step.name:16s} {step.expected_s:5d} s {step.limit_s:6d} s   {step.why}"
        )
    lines.append(f"    together         {sum(step.expected_s for step in STEPS):5d} s")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the steps and their expected seconds")
    parser.add_argument("--out", type=Path, help="folder for the results; made if need be")
    parser.add_argument("--bundle", type=Path, help="folder made by make gpu-bundle")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all (default 540)")
    parser.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="go on with the results in FOLDER; without a name in --out",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=[step.name for step in STEPS],
        metavar="STEP",
        help="this step; may be given again",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes and every 30th test")
    parser.add_argument(
        "--break",
        dest="broken",
        action="append",
        default=[],
        metavar="STEP=HOW",
        help=f"rehearse a step that ends badly ({', '.join(BREAKS)}); with --device cpu",
    )
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked: whatever is wrong with them is said before anything runs or is written.

    Adds `earlier`, the folder whose results are gone on with, or None.
    """
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.list:
        return args
    args.broken = dict(part.partition("=")[::2] for part in args.broken)
    if args.out is None:
        parser.error("--out must be given: a folder for the results")
    args.earlier = args.out if args.resume is True else args.resume
    for check in (budget_problem, break_problem, bundle_problem, resume_problem, out_problem):
        problem = check(args)
        if problem is not None:
            parser.error(problem)
    return args


def budget_problem(args: argparse.Namespace) -> str | None:
    if not args.budget > 0:
        return f"--budget must be seconds above 0, got {args.budget}"
    return None


def out_problem(args: argparse.Namespace) -> str | None:
    """Makes the folder, or says why not."""
    if args.out.exists() and not args.out.is_dir():
        return f"--out must be a folder, got the file {args.out}"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--out must be a folder that can be made, got {args.out} ({error.strerror})"
    if not os.access(args.out, os.W_OK):
        return f"--out must be a folder to write in, got {args.out}"
    goes_on = args.earlier is not None and args.earlier.resolve() == args.out.resolve()
    if (args.out / "results.jsonl").exists() and not goes_on:
        return (
            f"--out must be a new folder, {args.out} has results; add --resume to go on with them"
        )
    return None


def break_problem(args: argparse.Namespace) -> str | None:
    for name, how in args.broken.items():
        if name not in [step.name for step in STEPS] or how not in BREAKS:
            return f"--break must be STEP={'|'.join(BREAKS)}, got {name}={how}"
    if args.broken and args.device != "cpu":
        return "--break must come with --device cpu, got cuda: it is for rehearsals"
    return None


def bundle_problem(args: argparse.Namespace) -> str | None:
    return bundle.problem(args.bundle) if args.bundle is not None else None


def resume_problem(args: argparse.Namespace) -> str | None:
    if args.earlier is None:
        return None
    if not (args.earlier / "results.jsonl").is_file():
        return f"--resume must be a folder with results.jsonl, got {args.earlier}"
    try:
        found = records.read(args.earlier / "results.jsonl")
    except ValueError as error:
        return f"--resume: {error}"
    for run in found:
        if run["kind"] == "run" and (run["device"], run["small"]) != (args.device, args.small):
            kind = f"--device {run['device']}{' --small' * run['small']}"
            return f"--resume must go on with the same device and sizes, {args.earlier} has {kind}"
    return None


def bring_along(earlier: Path, out: Path) -> None:
    """Copies the results of an earlier call into the folder of this one."""
    for name in ("results.jsonl", "first_light.log", "tests.xml", "profile.yaml"):
        if (earlier / name).exists():
            shutil.copyfile(earlier / name, out / name)


def describe_call(args: argparse.Namespace) -> dict[str, Any]:
    """What is needed to read the records of this call later."""
    commit, is_clean = bundle.version(args.bundle)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "clean": is_clean,
        "device": args.device,
        "small": args.small,
        "budget_s": args.budget,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "card": clocks.ask("name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.list:
        print(list_steps())
        return 0
    resumed = args.earlier is not None
    skip_tried = "ever" if resumed and not args.only else None
    place = Place(args.out.resolve(), args.device, args.small, skip_tried)
    if resumed and args.earlier.resolve() != place.out:
        bring_along(args.earlier, place.out)
    steps = steps_to_run(args.only, records.read(place.records))
    environment = environment_of(args.bundle and args.bundle.resolve(), args.device)
    light = FirstLight(place, args.budget, environment, args.broken)
    light.records.add("run", **describe_call(args))
    terminate = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = args.only or [step.name for step in STEPS]
    interrupted = True
    try:
        with suppress(KeyboardInterrupt):
            light.run(steps)
            interrupted = False
    finally:  # also where it is terminated
        signal.signal(signal.SIGTERM, terminate)
        found = records.read(place.records)
        summary = report.summary(found, names)
        records.replace_file(place.out / "summary.txt", f"{summary}\n".encode())
        say(f"\n{summary}")
    if interrupted:
        return 128 + signal.SIGINT
    return 0 if report.all_passed(found, names) else 1


if __name__ == "__main__":
    sys.exit(main())
