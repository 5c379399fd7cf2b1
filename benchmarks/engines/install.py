"""Puts everything below one folder: an environment per engine, and the models in its format.

What is there already is kept, so a call that broke off goes on with what is missing. A failure
concerns one engine: it is reported, and the measurement will show the engine's own error.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import Distribution
from pathlib import Path

from engines.catalogue import ENGINES, ENVIRONMENTS, Environment
from packaging.requirements import Requirement

HERE = Path(__file__).parent


def python_of(folder: Path, environment: str) -> Path:
    """The interpreter of an environment; the running one for the project's own."""
    return folder / environment / "bin" / "python" if environment else Path(sys.executable)


def run(log: Path, command: Sequence[str | Path], **variables: str) -> None:
    """Runs a command with its output in a log.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    print("  " + " ".join(map(str, command)), flush=True)
    with log.open("a") as output:
        output.write(f"\n$ {' '.join(map(str, command))}\n")
        output.flush()
        subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            check=True,
        )


def requirements_of(folder: Path, environment: Environment) -> list[str]:
    """The requirements of a package for this machine, without those that are left out."""
    site = next((folder / "lib").glob("python*/site-packages"))
    name = environment.requirements_of.replace("-", "_")
    found = Distribution.at(next(site.glob(f"{name}-*.dist-info"))).requires or []
    wanted = [Requirement(line) for line in found]
    return [
        str(one)
        for one in wanted
        if one.name not in environment.without
        and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def install(folder: Path, name: str) -> None:
    """Makes one environment; its folder is complete once it has the file `complete`."""
    environment, target = ENVIRONMENTS[name], folder / name
    if (target / "complete").exists():
        return
    log = folder / "setup.log"
    run(log, [sys.executable, "-m", "venv", "--clear", target])
    pip = [python_of(folder, name), "-m", "pip", "install", "--disable-pip-version-check"]
    for step in environment.steps:
        run(log, [*pip, *step], CMAKE_ARGS="-DGGML_NATIVE=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF")
    if environment.requirements_of:
        run(log, [*pip, *requirements_of(target, environment)])
    (target / "complete").touch()


def convert(folder: Path, model: str, source: str) -> None:
    """Writes a model in the format that ends in `source`, complete or not at all."""
    log, plain = folder / "setup.log", folder / "models" / model
    target, aside = Path(f"{plain}{source}"), Path(f"{plain}-unfinished{source}")
    if target.exists():
        return
    shutil.rmtree(aside, ignore_errors=True)
    aside.unlink(missing_ok=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, "-m", "engines.models"]
    commands: dict[str, list[str | Path]] = {
        "": [*script, model, aside],
        "-int8": [sys.executable, "-m", "dist_int8", "quantize", plain, aside],
        ".gguf": [*script, "--gguf", plain, aside],
        "-w8a8": [*script, "--w8a8", plain, aside],
        "-ctranslate2": [
            *(python_of(folder, "ctranslate2"), "-m", "ctranslate2.converters.transformers"),
            *("--model", plain, "--quantization", "int8", "--output_dir", aside),
        ],
        "-openvino": [
            *(python_of(folder, "openvino"), "-m", "optimum.commands.optimum_cli"),
            *("export", "openvino", "--model", plain, "--task", "text-generation-with-past"),
            *("--weight-format", "int8", aside),
        ],
    }
    variables = {"HF_HUB_OFFLINE": "1"}
    if commands[source][0] == sys.executable:
        variables["PYTHONPATH"] = str(HERE.parent)
    run(log, commands[source], **variables)
    aside.rename(target)


def set_up(folder: Path, engines: Sequence[str], models: Sequence[str]) -> int:
    """Installs the engines and converts the models.

    Returns:
        The number of failures; what failed is printed, its output is in setup.log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [ENGINES[name] for name in engines]
    failures = 0

    def attempt(title: str, work: Callable[..., None], *args: str) -> None:
        nonlocal failures
        print(title, flush=True)
        try:
            work(folder, *args)
        except (subprocess.CalledProcessError, OSError, StopIteration) as error:
            failures += 1
            print(f"  failed: {error!r}; see {folder / 'setup.log'}", flush=True)

    for model in models:
        attempt(f"{model}: folder", convert, model, "")
    for name in dict.fromkeys(engine.environment for engine in chosen if engine.environment):
        attempt(f"{name}: environment", install, name)
    for source in dict.fromkeys(engine.source for engine in chosen if engine.source):
        for model in models:
            attempt(f"{model}{source}", convert, model, source)
    return failures
