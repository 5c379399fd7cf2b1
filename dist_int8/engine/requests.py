"""What goes into the engine and what comes out: requests, tokens, completions."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from dist_int8.config import GenerationSettings
from dist_int8.engine.rules import find_eos_tokens
from dist_int8.engine.text import TextStream
from dist_int8.errors import RequestError
from dist_int8.int8.sampling_reference import NOT_A_TOKEN
from dist_int8.pipeline.rules import Rule


@dataclass(eq=False)
class Request:
    """One prompt and the state of its answer.

    Attributes:
        index: index of the prompt in the call.
        prompt_ids: its token ids.
        settings: how tokens are chosen and when the answer ends.
        seed: seed of its own random generator.
        text: the answer as text.
        prompt: the prompt as text, where it was given so.
        rules: how tokens are chosen, beyond what every request has.
        slot: its place in the KV cache while it runs.
        num_replayed: tokens of the answer that are prefilled again, after a recovery.
        num_submitted: tokens that went into the pipeline.
        num_pending: tokens that are being computed; two where the engine runs ahead.
        token_ids: the answer so far.
        finish_reason: "eos", "stop", "length", "time" or "cancelled" once it ended.
        error: why it ended without an answer.
        outbox: tokens that its caller has not taken yet.
        deadline: when its time is over, by the monotonic clock; None: never.
    """

    index: int
    prompt_ids: list[int]
    settings: GenerationSettings
    seed: int
    text: TextStream
    prompt: str | None = None
    rules: list[Rule] = field(default_factory=list)
    slot: int = -1
    num_replayed: int = 0
    num_submitted: int = 0
    num_pending: int = 0
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    outbox: deque[Token] = field(default_factory=deque)
    deadline: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.settings.max_time is not None:
            self.deadline = time.monotonic() + self.settings.max_time

    @property
    def prefill_ids(self) -> list[int]:
        """The tokens to prefill: the prompt and, after a recovery, the answer so far."""
        return self.prompt_ids + self.token_ids[: self.num_replayed]

    def take(self, token_id: int, eos_token_ids: frozenset[int], max_tokens: int) -> None:
        """Appends a token to the answer, and ends the answer if it was the last one.

        Args:
            token_id: the token, or NOT_A_TOKEN where the logits were NaN.
            eos_token_ids: tokens that end an answer.
            max_tokens: maximum number of tokens in a slot, prompt and answer together.
        """
        if token_id == NOT_A_TOKEN:
            self.error = RequestError(
                f"generate: logits of prompt {self.index} at position {self.num_submitted} must be "
                "numbers, got NaN; check the checkpoint, or use a wider dtype"
            )
            return
        self.token_ids.append(token_id)
        piece = self.text.push(token_id)
        self.finish_reason = self._find_end(token_id, eos_token_ids, max_tokens)
        if self.finish_reason is not None:
            piece += self.text.finish()
        self.outbox.append(Token(self.index, token_id, piece, self.finish_reason))

    def _find_end(
        self, token_id: int, eos_token_ids: frozenset[int], max_tokens: int
    ) -> str | None:
        """Why the answer ends with this token; None where it goes on."""
        settings = self.settings
        if token_id in find_eos_tokens(settings, eos_token_ids):
            return "eos"
        if self.text.stopped or token_id in settings.stop_token_ids:
            return "stop"
        if self.is_full(len(self.token_ids), max_tokens):
            return "length"
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "time"
        return None

    def is_full(self, num_tokens: int, max_tokens: int) -> bool:
        """Whether an answer of num_tokens has no room for another."""
        num_allowed = self.settings.count_new_tokens(len(self.prompt_ids))
        return num_tokens >= num_allowed or len(self.prompt_ids) + num_tokens >= max_tokens

    def may_run(self, ahead: int, max_tokens: int) -> bool:
        """Whether it has tokens to prefill, or one to decode.

        Args:
            ahead: how many tokens may be pending when another one is asked for.
            max_tokens: maximum number of tokens in a slot.
        """
        if self.num_prompt_left or not self.num_pending:
            return True
        if self.num_pending > ahead:
            return False
        return not self.is_full(len(self.token_ids) + self.num_pending, max_tokens)

    def replay(self) -> None:
        """Returns to the start, with the answer so far as part of what is prefilled."""
        self.num_replayed = len(self.token_ids)
        self.num_submitted = 0
        self.num_pending = 0

    @property
    def ended(self) -> bool:
        """Whether it has its answer, was cancelled or failed."""
        return self.finish_reason is not None or self.error is not None

    @property
    def num_prompt_left(self) -> int:
        """Tokens that are still to be prefilled."""
        return max(0, len(self.prompt_ids) + self.num_replayed - self.num_submitted)


@dataclass(frozen=True)
class Token:
    """One new token of one prompt, for streaming.

    Attributes:
        index: index of the prompt in the call.
        token_id: the token.
        text: the text that became certain with it (may be empty: part of a character, or what may
            begin a stop string).
        finish_reason: set on a prompt's last token.
    """

    index: int
    token_id: int
    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        prompt: the prompt as text: as it was given, a chat as its template renders it, and token
            ids decoded.
        text: the answer, without special tokens and without the stop string.
        token_ids: new tokens only, an end-of-sequence token included.
        finish_reason: "eos", "stop" (a stop string or one of stop_token_ids), "length"
            (max_new_tokens, max_length or the context) or "time" (max_time).
        num_stages, num_micro_batches: how the call was pipelined.
        prefill_tokens_per_s: prompt tokens of the whole call per second until the last first token.
        decode_tokens_per_s: tokens of the whole call per second after that.
        stages: rank, device, blocks [first, last] and bytes of every stage.
    """

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    num_stages: int
    num_micro_batches: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    stages: list[dict[str, Any]]
