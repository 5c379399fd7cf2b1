"""Distributed inference of language models with pipelined int8 layers (LLM.int8()).

import dist_int8

with dist_int8.load("folder-or-hub-id", devices=["cpu", "cpu"]) as model:
    print(model.generate("The capital of France is", max_new_tokens=24)[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_int8.errors import (
    DistInt8Error,
    ProtocolError,
    QueueFullError,
    RankError,
    RankLostError,
    RequestError,
    ShuttingDownError,
    StageTimeoutError,
)

if TYPE_CHECKING:
    from dist_int8.api.load import load
    from dist_int8.api.model import Model
    from dist_int8.evaluation.outlier_features import inject_outlier_features
    from dist_int8.int8.convert import convert
    from dist_int8.int8.linear import Int8Linear

__version__ = "0.1.0"
__all__ = [
    "DistInt8Error",
    "Int8Linear",
    "Model",
    "ProtocolError",
    "QueueFullError",
    "RankError",
    "RankLostError",
    "RequestError",
    "ShuttingDownError",
    "StageTimeoutError",
    "convert",
    "inject_outlier_features",
    "load",
]

_HOMES = {
    "Int8Linear": "int8.linear",
    "Model": "api.model",
    "convert": "int8.convert",
    "inject_outlier_features": "evaluation.outlier_features",
    "load": "api.load",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that importing dist_int8 stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dist_int8' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"dist_int8.{_HOMES[name]}"), name)
