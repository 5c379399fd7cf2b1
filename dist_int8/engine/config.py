"""How an engine schedules its requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """How an engine schedules its requests.

    Attributes:
        num_stages: stages of the pipeline.
        num_micro_batches: maximum number of lanes; 1 keeps a single micro-batch in flight.
        prefill_chunk: maximum number of prompt tokens in a micro-batch.
        smallest_chunk: prompt tokens below which cutting costs more than an idle stage.
        max_queue: requests that may wait for a slot.
        eos_token_ids: tokens that end an answer.
        runs_ahead: whether a step is submitted before the tokens of the one ahead of it are known:
            only where one stage is the whole pipeline, and looks them up itself. A sequence that
            ends has then one token computed for nothing.
    """

    num_stages: int
    num_micro_batches: int
    prefill_chunk: int
    smallest_chunk: int
    max_queue: int
    eos_token_ids: frozenset[int] = frozenset()
    runs_ahead: bool = False
