"""The keyword arguments of `Model.generate`, for type checkers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

Biases = Mapping[tuple[int, ...], float] | list[tuple[list[int], float]]


class GenerationKeywords(TypedDict, total=False):
    """The fields of `GenerationSettings`, which documents and checks them; None: not given."""

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    max_time: float | None
    temperature: float | None
    do_sample: bool | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    top_h: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    seed: int | None
    stop: str | list[str] | tuple[str, ...] | None
    stop_token_ids: int | list[int] | tuple[int, ...] | None
    eos_token_id: int | list[int] | tuple[int, ...] | None
    ignore_eos: bool | None
    suppress_tokens: int | list[int] | tuple[int, ...] | None
    begin_suppress_tokens: int | list[int] | tuple[int, ...] | None
    bad_words_ids: list[list[int]] | None
    sequence_bias: Biases | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | list[int] | tuple[int, ...] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    remove_invalid_values: bool | None
    model_defaults: bool | None
