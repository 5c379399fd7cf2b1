"""What nvidia-smi says while a step runs: clocks, power, temperature; so that throttling shows."""

import statistics
import subprocess
import threading
from contextlib import suppress

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu")
NAMES = ("sm_mhz", "mem_mhz", "power_w", "temperature_c", "busy_pct")
EVERY_MS = 1000


def ask(fields: str) -> str | None:
    """What it says of the first card, once; None where there is no such tool."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return lines[0] if lines else None


class Clocks:
    """Samples of the first card while the body of a `with` runs."""

    def __init__(self) -> None:
        self._samples: list[list[float]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Clocks":
        command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(FIELDS)}"]
        command += ["--format=csv,noheader,nounits", f"--loop-ms={EVERY_MS}"]
        with suppress(OSError):  # no such tool, no samples
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # "[N/A]"
                self._samples.append([float(value) for value in line.split(",")])

    def summary(self) -> dict[str, list[float]]:
        """Least, median and most of each, of the samples in which the card was busy."""
        busy = [sample for sample in list(self._samples) if sample[-1] > 0]
        return {
            name: [min(values), statistics.median(values), max(values)]
            for name, values in zip(NAMES, zip(*busy, strict=True), strict=False)
        }
