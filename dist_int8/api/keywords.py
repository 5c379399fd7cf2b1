"""The keyword arguments of `Model.generate`, for type checkers."""

from __future__ import annotations

from typing import TypedDict


class GenerationKeywords(TypedDict, total=False):
    """The fields of `GenerationSettings`, which documents and checks them; None: not given."""

    max_new_tokens: int | None
    temperature: float | None
    do_sample: bool | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | list[str] | tuple[str, ...] | None
