"""The compiled library `dist_int8/_ops.so`: found, loaded once, and described.

`load()` runs when `dist_int8.int8.ops` is imported. Without a library (a source tree that was never
built, say) every op runs in plain torch; `library_info()` says so and why.
"""

import ctypes
import importlib.util
from typing import Any

import torch
from torch import Tensor

OPS = (
    "quantize_rows",
    "int8_linear",
    "linear",
    "add_norm",
    "norm",
    "silu_mul",
    "attention",
    "transform_layout",
)

_path: str | None = None
_error: str | None = None


def load() -> bool:
    """Load the library if it is there and describe its ops to torch.compile; is it loaded?"""
    global _path, _error
    if _path is not None:
        return True
    spec = importlib.util.find_spec("dist_int8._ops")
    if spec is None or spec.origin is None:
        _error = "dist_int8/_ops.so is not built; run make kernels"
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        _error = f"{spec.origin} did not load: {error}"
        return False
    _path, _error = spec.origin, None
    _register_fakes()
    return True


def library_info() -> dict[str, Any]:
    """What was loaded, for `dist-int8 doctor`.

    path: of the library, or None. error: why it is not loaded, or None. cpu_instruction_set:
    "avx512_vnni", "avx2" or "generic", chosen at run time (None without a library). cpu_ops,
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


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Whether op `name` has a compiled kernel for "CPU" or "CUDA"."""
    if _path is None:
        return False
    op = f"dist_int8::{name}"
    if not torch._C._dispatch_has_kernel(op):  # an older library does not know the op
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, dispatch_key)


def _string(function: Any) -> str:
    function.restype = ctypes.c_char_p
    return function().decode()


def _register_fakes() -> None:
    """Shapes and dtypes of every op's results, for torch.compile and meta tensors."""

    @torch.library.register_fake("dist_int8::quantize_rows")
    def _(
        x: Tensor, outlier_rule: int, outlier_threshold: float, hot_columns: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        planes = [x.new_empty(x.shape, dtype=torch.int8) for _ in range(2)]
        return planes[0], planes[1], x.new_empty(x.shape[0], dtype=torch.float32)

    @torch.library.register_fake("dist_int8::int8_linear")
    def _(
        x: Tensor,
        weight_int8: Tensor,
        col_scale: Tensor,
        bias: Tensor | None,
        outlier_rule: int,
        outlier_threshold: float,
        hot_columns: Tensor | None,
        hot_weight: Tensor | None,
    ) -> Tensor:
        return x.new_empty(x.shape[0], weight_int8.shape[0])

    @torch.library.register_fake("dist_int8::linear")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0])

    @torch.library.register_fake("dist_int8::add_norm")
    def _(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm_kind: int
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x)

    @torch.library.register_fake("dist_int8::norm")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm_kind: int) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("dist_int8::silu_mul")
    def _(gate_up: Tensor) -> Tensor:
        return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)

    @torch.library.register_fake("dist_int8::attention")
    def _(
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        segments: Tensor,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        cos: Tensor | None,
        sin: Tensor | None,
        alibi_slopes: Tensor | None,
        window: int,
    ) -> Tensor:
        return qkv.new_empty(qkv.shape[0], num_heads * key_cache.shape[2])

    if torch._C._dispatch_has_kernel("dist_int8::transform_layout"):

        @torch.library.register_fake("dist_int8::transform_layout")
        def _(x: Tensor, source: int, target: int, rows: int, cols: int) -> Tensor:
            tile_rows, tile_cols = ((1, 1), (1, 32), (8, 32), (32, 32))[target]
            stored = (-(-rows // tile_rows) * tile_rows, -(-cols // tile_cols) * tile_cols)
            return x.new_empty(stored)
