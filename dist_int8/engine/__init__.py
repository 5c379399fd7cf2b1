"""Requests: admission to KV slots, micro-batches, sampling, text, speed."""

from dist_int8.engine.config import EngineConfig
from dist_int8.engine.engine import Engine
from dist_int8.engine.requests import Completion, Request, Token
from dist_int8.engine.sampling import TokenSampler
from dist_int8.engine.speed import Speed

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "Request",
    "Speed",
    "Token",
    "TokenSampler",
]
