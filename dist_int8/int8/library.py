"""The compiled library `dist_int8/_ops.so`: found, loaded once, and described.

`load()` runs when `dist_int8.int8.ops` is imported. Without a library (a source tree that was never
built, say) every op runs in plain torch; `library_info()` says so and why. The environment variable
DIST_INT8_LIBRARY names another library, for a source tree on a machine that cannot build one, and
DIST_INT8_CPU_ISA the CPU kernels to use where the processor has more than one kind, for tests.
"""

import ctypes
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from dist_int8.int8.registry import OPS, has_kernel

INSTRUCTION_SETS = ("amx", "avx512_vnni", "avx2", "generic")

_path: str | None = None
_error: str | None = None


def load() -> bool:
    """Loads the library and describes its ops to torch.compile; returns whether there is one.

    Raises:
        ImportError: the library that DIST_INT8_LIBRARY names is not there or does not load, or
            DIST_INT8_CPU_ISA names no instruction set.
    """
    global _path, _error
    if _path is not None:
        return True
    if (wanted := os.environ.get("DIST_INT8_CPU_ISA")) and wanted not in INSTRUCTION_SETS:
        raise ImportError(
            f"environment: DIST_INT8_CPU_ISA must be one of {', '.join(INSTRUCTION_SETS)}, got "
            f"{wanted!r}; choose one, or unset it"
        )
    named = os.environ.get("DIST_INT8_LIBRARY")
    path = _named(named) if named else _built()
    if path is None:
        _error = "dist_int8/_ops.so is not built; run make kernels"
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        _error = f"{path} did not load: {error}"
        if named:
            raise ImportError(f"environment: DIST_INT8_LIBRARY: {_error}") from None
        return False
    _path, _error = path, None
    from dist_int8.int8 import autograd_kernels, fakes  # noqa: F401 (they describe its ops)

    return True


def _built() -> str | None:
    """Path of the library that was built with this package, or None."""
    spec = importlib.util.find_spec("dist_int8._ops")
    return spec.origin if spec is not None else None


def _named(path: str) -> str:
    if not Path(path).is_file():
        raise ImportError(
            f"environment: DIST_INT8_LIBRARY must be a compiled library, got {path!r}, which is "
            "not there; build it (make gpu-bundle) or unset the variable"
        )
    return str(Path(path).resolve())


def library_info() -> dict[str, Any]:
    """Describes what was loaded, for `dist-int8 doctor`.

    path: of the library, or None. error: why it is not loaded, or None. cpu_instruction_set:
    "amx", "avx512_vnni", "avx2" or "generic", chosen at run time (None without a library). cpu_ops,
    cuda_ops: names of ops with a compiled kernel. cuda_architectures: such as ["80", "90a"], those
    the library was built for.
    """
    info: dict[str, Any] = {
        "path": _path,
        "error": _error,
        "cpu_instruction_set": None,
        "cpu_ops": [name for name in OPS if has_kernel(name, "CPU")],
        "cuda_ops": [name for name in OPS if has_kernel(name, "CUDA")],
        "cuda_architectures": [],
    }
    if _path is not None:
        library = ctypes.CDLL(_path)
        info["cpu_instruction_set"] = _string(library.dist_int8_cpu_instruction_set)
        architectures = _string(library.dist_int8_cuda_architectures)
        info["cuda_architectures"] = architectures.split(",") if architectures else []
    return info


def _string(function: Any) -> str:
    function.restype = ctypes.c_char_p
    return function().decode()
