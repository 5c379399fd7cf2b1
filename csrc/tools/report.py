"""Registers, stack and spills of every CUDA kernel in a build folder, against recorded figures.

    python csrc/tools/report.py build             print the report, exit 1 where a kernel is worse
    python csrc/tools/report.py build --record    write figures.json from this build

Reads the logs that record.py keeps beside the objects. A kernel of ours may not spill a register. A
CUTLASS kernel may not need more registers, stack or spills than figures.json says, and none may let
the compiler serialize its wgmma instructions. Figures hold for one release of nvcc: another one is
named, and its CUTLASS kernels are only printed. Without nvcc there is nothing to report.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FIGURES = Path(__file__).with_name("figures.json")
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SERIALIZED = re.compile(r"\((C75\d\d)\).*in the function '(\S+)'")
CUTLASS_OBJECT = re.compile(r"int8_gemm_sm\w+\.dir")
TILES = (  # of a demangled CUTLASS kernel: 2.x names the tile first, 3.x after the cluster
    re.compile(r"gemm::GemmShape<(\d+), (\d+), (\d+)>"),
    re.compile(
        r"WarpSpecialized\w*\s*>, cute::tuple<cute::C<(\d+)>, cute::C<(\d+)>, cute::C<(\d+)>"
    ),
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas said about one kernel for one architecture."""

    architecture: str  # "sm_80"
    name: str
    is_cutlass: bool
    registers: int = 0
    stack: int = 0  # bytes per thread, spills included
    spills: int = 0  # bytes per thread, stores and loads
    remark: str = ""  # number of a remark that costs speed, such as C7510

    @property
    def figures(self) -> dict[str, int]:
        return {key: asdict(self)[key] for key in ("registers", "stack", "spills")}


def parse(log: str, object_path: str, demangle: dict[str, str] | None = None) -> list[Kernel]:
    """The kernels in a log of nvcc -Xptxas=-v; `demangle` maps symbols to readable names."""
    cutlass = CUTLASS_OBJECT.search(object_path)
    kernels: dict[tuple[str, str], Kernel] = {}
    remarks = {symbol: number for number, symbol in SERIALIZED.findall(log)}
    at: tuple[str, str] | None = None
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            at = (entry[1], entry[2])
            name = (demangle or {}).get(entry[1], entry[1])
            if cutlass:
                name = f"int8_gemm {_tile(name)}"
            remark = remarks.get(entry[1], "")
            kernels[at] = Kernel(entry[2], _short(name), cutlass is not None, remark=remark)
        elif at is not None and (memory := MEMORY.search(line)):
            stack, stores, loads = map(int, memory.groups())
            kernels[at] = replace(kernels[at], stack=stack, spills=stores + loads)
        elif at is not None and (used := REGISTERS.search(line)):
            kernels[at] = replace(kernels[at], registers=int(used[1]))
            at = None
    return list(kernels.values())


def problems(kernels: list[Kernel], recorded: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """One line for each kernel that may not stay as it is. `recorded`: architecture, name, figures.

    An empty `recorded` holds nothing against CUTLASS kernels but a remark.
    """
    found = []
    for kernel in kernels:
        where = f"{kernel.architecture} {kernel.name}"
        if kernel.remark:
            found.append(f"{where}: ptxas must keep wgmma in flight, got {kernel.remark}")
        if not kernel.is_cutlass:
            if kernel.spills:
                found.append(f"{where}: our own kernels must not spill, got {kernel.spills} bytes")
            continue
        if not recorded:
            continue
        limits = recorded.get(kernel.architecture, {}).get(kernel.name)
        if limits is None:
            found.append(f"{where}: has no recorded figure; measure it, then --record")
            continue
        for key, value in kernel.figures.items():
            if value > limits[key]:
                found.append(f"{where}: {key} must be at most {limits[key]}, got {value}")
    return found


def table(kernels: list[Kernel]) -> str:
    lines = [f"{'':8} {'registers':>9} {'stack':>6} {'spills':>6}  kernel"]
    for kernel in sorted(kernels, key=lambda k: (k.architecture, k.is_cutlass, k.name)):
        lines.append(
            f"{kernel.architecture:8} {kernel.registers:9} {kernel.stack:6} {kernel.spills:6}  "
            f"{kernel.name} {kernel.remark}".rstrip()
        )
    return "\n".join(lines)


def read(build: Path) -> tuple[list[Kernel], list[tuple[float, str]]]:
    """All kernels of a build folder, and (processor seconds, source) of each compilation."""
    kernels, times = [], []
    for log_path in sorted((build / "CMakeFiles").rglob("*.cu.o.log")):
        if not log_path.with_suffix("").exists():
            continue  # of an object that is no longer built
        first, _, log = log_path.read_text().partition("\n")
        name = str(log_path.relative_to(build))
        kernels += parse(log, name, _demangle({symbol for symbol, _ in ENTRY.findall(log)}))
        times.append((float(first.split()[0]), name.removesuffix(".o.log")))
    return kernels, times


def nvcc_release() -> str | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match[1] if match else "unknown"


def _demangle(symbols: set[str]) -> dict[str, str]:
    tool = shutil.which("c++filt")
    if tool is None or not symbols:
        return {}
    ordered = sorted(symbols)
    command = [tool, "-r"]  # without a limit of depth: names of CUTLASS 3.x are deep
    done = subprocess.run(
        command, input="\n".join(ordered), capture_output=True, text=True, check=True
    )
    return dict(zip(ordered, done.stdout.splitlines(), strict=True))


def _tile(name: str) -> str:
    for pattern in TILES:
        if match := pattern.search(name):
            return "x".join(match.groups())
    return name


def _short(name: str) -> str:
    """Without arguments, return type and our own namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|\bdist_int8::|\bdevice::|^void ", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="build folder, usually build")
    parser.add_argument("--record", action="store_true", help=f"write {FIGURES.name}")
    arguments = parser.parse_args()

    release = nvcc_release()
    if release is None:
        print("report: no nvcc on this machine, so no CUDA kernel was compiled: nothing to report")
        return 0
    kernels, times = read(arguments.build)
    if not kernels:
        print(f"report: no logs of nvcc in {arguments.build}; run make kernels first")
        return 1
    print(table(kernels))
    print(
        f"\nnvcc {release}, {sum(seconds for seconds, _ in times):.0f} s of processor time in all"
    )
    for seconds, name in sorted(times, reverse=True)[:5]:
        print(f"  {seconds:6.1f} s  {name}")
    for library in arguments.build.glob("_ops.so"):
        print(f"  {library.stat().st_size / 2**20:.1f} MiB {library}")

    if arguments.record:
        figures: dict[str, dict[str, dict[str, int]]] = {}
        for kernel in sorted(kernels, key=lambda k: (k.architecture, k.name)):
            if kernel.is_cutlass:
                figures.setdefault(kernel.architecture, {})[kernel.name] = kernel.figures
        FIGURES.write_text(json.dumps({"nvcc": release, "kernels": figures}, indent=2) + "\n")
    recorded = json.loads(FIGURES.read_text())
    if recorded["nvcc"] != release:
        print(f"report: figures are for nvcc {recorded['nvcc']}; CUTLASS kernels are not compared")
        recorded["kernels"] = {}
    found = problems(kernels, recorded["kernels"])
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
