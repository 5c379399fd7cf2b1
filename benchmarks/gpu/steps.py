"""The steps of first light, in order of worth: what each runs, how long it should and may take.

Expected seconds were measured on an H200 with 16 CPU cores where a step says so, the others are
guesses; each says what it is made of. "a start" is a process that imports torch and makes a CUDA
context: 6 s there, 13 s with transformers.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Place:
    """Where the steps run and put what they find.

    Attributes:
        out: folder of the results.
        device: "cuda", or "cpu" for a rehearsal.
        small: tiny sizes, and every 30th test.
        skip_tried: leave out what the records say was tried, one of records.SINCE; None: nothing.
    """

    out: Path
    device: str
    small: bool
    skip_tried: str | None = None

    @property
    def flags(self) -> list[str]:
        return ["--skip-tried", self.skip_tried] if self.skip_tried else []

    @property
    def records(self) -> Path:
        return self.out / "results.jsonl"


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: what --only takes.
        command: what is run, given the place.
        expected_s: seconds that it should take there.
        limit_s: seconds after which it counts as hung.
        least_s: seconds without which it is not worth starting.
        why: what expected_s is made of.
    """

    name: str
    command: Callable[[Place], list[str]]
    expected_s: int
    limit_s: int
    least_s: int
    why: str


def _script(name: str, seconds: tuple[int, int, int], why: str, *arguments: str) -> Step:
    def command(place: Place) -> list[str]:
        flags = ["--device", place.device, "--records", str(place.records)]
        flags += ["--small"] * place.small + place.flags
        return [sys.executable, str(HERE / f"{name}.py"), *flags, *arguments]

    return Step(name, command, *seconds, why)


def _tests(name: str, seconds: tuple[int, int, int], why: str, *arguments: str) -> Step:
    def command(place: Place) -> list[str]:
        return [
            *(sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu" / f"{name}.py")),
            *("-v", "--color=no", "--maxfail", "20", "-p", "no:cacheprovider"),
            *("-p", "pytest_records", "--records", str(place.records)),
            *("--every", "30" if place.small else "1"),
            *("-o", "junit_logging=no", "--junit-xml", "{junit}"),
            *place.flags,
            *arguments,
        ]

    return Step(name, command, *seconds, why)


def _profile(place: Place) -> list[str]:
    script = _script("device_profile", (0, 0, 0), "")
    return [*script.command(place), "--profile", str(place.out / "profile.yaml")]


# name, (expected, limit, least seconds), what they are made of
STEPS = (
    _script("card", (20, 120, 15), "measured: a start, all files cold, 18 of the 22 ops once"),
    _tests("test_matmul", (20, 120, 15), "a start: 6; 689 tests: 13, of which 682 measured: 11"),
    _tests("test_rows", (11, 60, 10), "a start: 6; 303 tests, measured: 4"),
    _tests("test_attention", (13, 60, 10), "a start: 6; 90 tests, of which 32 measured: 5"),
    _tests("test_sampling", (9, 60, 8), "a start: 6; 16 tests of two kernels"),
    _tests(
        "test_block",
        (31, 90, 12),
        "measured: a start: 13; 43 tests and CUDA graphs: 3; two more starts: 15",
    ),
    _tests(
        "test_models",
        (52, 110, 20),
        "a start, and one of a rank; 33 tests, measured: 27; 6 more: 8",
    ),
    _tests("test_api", (15, 60, 12), "measured: a start: 13; 2 tests of a tiny model"),
    _script(
        "model",
        (62, 170, 30),
        "measured: 42 with a start, one of ours, transformers'; two more of ours, sampling: 20",
    ),
    _script(
        "stages",
        (55, 150, 30),
        "a start, and one of a rank: 25; 4 loads of 8 GB: 5; 4 x 136 steps at 10 to 20 ms: 10",
    ),
    _script("block", (11, 60, 10), "measured: a start; 2.5 GB; 6 cells of 9 medians"),
    _script(
        "linear",
        (100, 180, 25),
        "a start: 6; 8 layers: 12, bitsandbytes' from the CPU: 10; 96 cells of 10 medians: 70",
    ),
    Step("device_profile", _profile, 12, 45, 12, "a start: 6; copies of 4 GB and 5 rounds: 4"),
    _script("counters", (30, 75, 20), "two starts, one under ncu: 20; 8 kernels in passes: 10"),
    _tests(
        "test_sanitizer",
        (70, 200, 40),
        "a start and three of the program, two of them under the sanitizer, 3 times as slow: 70",
        *("-k", "program or memcheck or racecheck", "--test-limit", "100"),
    ),
    _tests("test_layouts", (20, 60, 10), "a start: 6; 97 tests, 1 here, and 4.3 GB four times: 12"),
)
