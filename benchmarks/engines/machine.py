"""Measures what the machine can do, and says which machine it is."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

# the processor's instructions that decide how fast int8 can be
_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512", "amx")


def measure_machine(folder: Path, threads: int) -> dict[str, Any]:
    """Compiles machine.cpp for this processor and runs it.

    Returns:
        read_gb_per_s, int8_gops, int8_instructions and others; or error.
    """
    source, program = Path(__file__).with_name("machine.cpp"), folder / "machine"
    compile_it = ["g++", "-O3", "-march=native", "-pthread", str(source), "-o", str(program)]
    try:
        subprocess.run(compile_it, check=True, capture_output=True, text=True, timeout=300)
        ran = subprocess.run(
            [str(program), str(threads)], check=True, capture_output=True, text=True, timeout=300
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": f"{error}: {getattr(error, 'stderr', '')}"}
    return json.loads(ran.stdout)


def describe_machine() -> dict[str, Any]:
    """Model and cores of the processor, and which of the instructions that matter it has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [flag for flag in named.get("flags", "").split() if flag.startswith(_FLAGS)]
    return {
        "cpu": named.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "flags": flags,
        "load_average": os.getloadavg()[0],
    }
