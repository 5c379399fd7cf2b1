"""The handle of a loaded model: generate, logits, tokenizer, plan, shutdown."""

from __future__ import annotations

import atexit
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from dist_int8.config import GenerationSettings, Settings
from dist_int8.engine import Completion, Engine, Request, Speed, Token
from dist_int8.engine.text import TextStream
from dist_int8.errors import RankError, ShuttingDownError
from dist_int8.models import ModelSpec
from dist_int8.models.tokenizer import load_tokenizer
from dist_int8.partition import Plan
from dist_int8.pipeline import schedule
from dist_int8.pipeline.trace import Trace

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class Model:
    """A loaded model. Use it as a context manager, or call `shutdown` when done.

    Attributes:
        plan: what each stage holds.
        settings: how it was loaded.
        folder: of the checkpoint.
    """

    def __init__(
        self, *, engine: Engine, plan: Plan, settings: Settings, folder: Path, spec: ModelSpec
    ) -> None:
        self.plan = plan
        self.settings = settings
        self.folder = folder
        self._spec = spec
        self._engine = engine
        self._closed = False
        self._closing = threading.Lock()
        atexit.register(self.shutdown)
        world = engine.pipeline.world
        if world.monitor is not None:
            world.monitor.on_loss = self._look_after_ranks

    def __repr__(self) -> str:
        stages = ", ".join(
            f"{stage.device}: blocks {stage.first_block}-{stage.last_block}"
            for stage in self.plan.stages
        )
        closed = ", closed" if self._closed else ""
        return f"<Model {self._spec.model_type} {str(self.folder)!r}, {stages}{closed}>"

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model, or None if its folder has none."""
        try:
            return load_tokenizer(self.folder)
        except ValueError:
            return None

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Rank, device, blocks [first, last] and bytes of every stage."""
        return [
            {
                "rank": stage.rank,
                "device": stage.device,
                "blocks": [stage.first_block, stage.last_block],
                "bytes": stage.bytes,
            }
            for stage in self.plan.stages
        ]

    def generate(
        self,
        prompts: Prompts,
        *,
        generation_config: GenerationConfig | None = None,
        on_token: Callable[[Token], None] | None = None,
        stream: bool = False,
        **settings: Any,
    ) -> Any:
        """Answers one prompt or many. Calls from several threads share the pipeline.

        Args:
            prompts: a string, a list of strings, token ids, or a list of token ids.
            generation_config: transformers' settings; those of other methods than greedy decoding
                and sampling are refused by name.
            on_token: called with every `Token` as it arrives.
            stream: return an iterator of `Token` instead, which ends in the list of completions
                as its StopIteration value.
            **settings: fields of `GenerationSettings` (max_new_tokens, temperature, top_k, top_p,
                repetition_penalty, do_sample, seed, stop); they win over generation_config. Greedy
                unless temperature is above 0 or do_sample is true. Prompt i samples with seed + i.

        Returns:
            A list of `Completion`, one a prompt.

        Raises:
            ValueError: a bad setting, an empty prompt, or one longer than the context.
            QueueFullError: too many requests of other calls wait already.
            RankError: a rank ended; the handle is closed then.
            RuntimeError: the model's logits are NaN.
        """
        if not isinstance(stream, bool):
            raise ValueError(
                f"generate: stream must be true or false, got {stream!r}; a callback is on_token"
            )
        chosen = GenerationSettings.from_generation_config(generation_config, settings)
        requests = self._requests(prompts, chosen)
        tokens = self._run(requests)
        if stream:
            return tokens
        while True:
            try:
                token = next(tokens)
            except StopIteration as stop:
                return stop.value
            if on_token is not None:
                on_token(token)

    def request(
        self, prompt: str | Sequence[int], settings: GenerationSettings, index: int = 0
    ) -> Request:
        """One prompt with settings of its own, for `run`.

        Args:
            prompt: text or token ids.
            settings: how its tokens are chosen and when it ends.
            index: what its tokens are told apart by; it samples with seed + index.

        Raises:
            ValueError: an empty prompt, one longer than the context, or ids that are no tokens.
        """
        seed = settings.seed if settings.seed is not None else random.SystemRandom().getrandbits(48)
        prompt_ids = self._prompt_ids(prompt, index)
        text = TextStream(self.tokenizer, settings.stop)
        return Request(index, prompt_ids, settings, (seed + index) % 2**63, text)

    def run(self, requests: Iterable[Request], keep_going: bool = False) -> Iterator[Token]:
        """Answers requests made by `request`, taken as there is room; yields tokens as they arrive.

        Args:
            requests: any number, lazily made if need be.
            keep_going: one that fails by itself (its logits are NaN) has its `error` set and does
                not end the others.

        Raises:
            QueueFullError: too many requests of other calls wait already.
            RankError: a rank ended; the handle is closed then.
            RuntimeError: the model's logits are NaN.
        """
        with self._running():
            yield from self._engine.run(requests, keep_going)

    @property
    def num_micro_batches(self) -> int:
        """Lanes of the engine, micro-batches that are in flight when there is enough to do."""
        return self._engine.num_micro_batches

    @property
    def max_tokens(self) -> int:
        """Tokens of a sequence at most, prompt and answer together."""
        return self._engine.limits.max_tokens

    @property
    def trace(self) -> Trace:
        """When each stage worked on which micro-batch since the model was loaded."""
        return self._engine.pipeline.trace

    def logits(self, input_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Logits fp32 [batch, tokens, vocab] of token ids [batch, tokens], on the CPU.

        Raises:
            ValueError: not two-dimensional, empty, longer than the context, or not a token.
            RankError: a rank ended; the handle is closed then.
        """
        try:
            rows = torch.as_tensor(input_ids)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"logits: input_ids must be integers [batch, tokens], got {error}; give "
                "equally long lists of token ids"
            ) from None
        if rows.ndim != 2 or not rows.numel() or rows.is_floating_point():
            raise ValueError(
                "logits: input_ids must be integers [batch, tokens], got "
                f"{rows.dtype} {list(rows.shape)}; give a list of equally long lists of token ids"
            )
        pieces = self.logits_of(rows.tolist())
        logits = torch.empty(*rows.shape, self._spec.vocab_size, dtype=torch.float32)
        for index, start, values in pieces:
            logits[index, start : start + values.shape[0]] = values
        return logits

    def logits_of(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, Tensor]]:
        """Logits of token ids of any lengths, a piece at a time, where all of them are too many.

        Short sequences share a micro-batch. Other calls wait until the last piece was taken, or the
        iterator closed.

        Returns:
            An iterator of (sequence, first position, logits fp32 [tokens, vocab] on the CPU), in
            order; pieces come again after a lost rank was replaced.

        Raises:
            ValueError: a sequence is empty, longer than the context, or holds what is no token.
            RankError: a rank ended; the handle is closed then.
        """
        lists = [list(sequence) for sequence in sequences]
        for index, token_ids in enumerate(lists):
            self._check_prompt(token_ids, index, num_new=0, call="logits")
        return self._logits_of(lists)

    def _logits_of(self, sequences: list[list[int]]) -> Iterator[tuple[int, int, Tensor]]:
        with self._running():
            yield from self._engine.logits(sequences)

    def schedule(self, num_prompts: int = 1, num_decode_steps: int = 4) -> str:
        """The order of work as a picture, a line a stage, for so many short prompts."""
        lanes = self._engine.count_lanes(num_prompts)
        grid = schedule.build(
            len(self.plan.stages), lanes, num_prefill_chunks=1, num_decode_steps=num_decode_steps
        )
        return schedule.draw(grid)

    def shutdown(self) -> None:
        """Ends every stage and its process. Safe to call twice.

        Calls of other threads that are under way get `ShuttingDownError`; `drain` lets them end
        first.
        """
        with self._closing:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.shutdown)
            self._engine.stop()
            try:
                self._engine.drain()
                self._engine.pipeline.close()
            except RuntimeError:  # a stage is gone already; end the others all the same
                self._engine.pipeline.kill()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Shuts down in an orderly way: running prompts get their answers first.

        Prompts without a KV slot yet, and calls that come, get `ShuttingDownError`. It may be
        called from any thread but that of a `generate` under way, which could not go on meanwhile.

        Args:
            timeout_s: so long at most, then what still runs gets `ShuttingDownError` too; by
                default the setting drain_timeout.

        Returns:
            Whether everything that ran got its answer.
        """
        timeout_s = self.settings.drain_timeout if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        self._engine.refuse_new()
        try:
            while self._engine.num_running and time.monotonic() < deadline:
                self._engine.step()
        except RuntimeError:  # its callers get the same; `failed` says so below
            pass
        done = not self._engine.num_running and not self._engine.failed
        self._engine.give_up(
            ShuttingDownError(
                f"generate: the answer must end within {timeout_s:g} s of the shutdown"
            )
        )
        self.shutdown()
        return done

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _requests(self, prompts: Prompts, settings: GenerationSettings) -> list[Request]:
        items: list[Any]
        if isinstance(prompts, str):
            items = [prompts]
        else:
            try:
                items = list(prompts.tolist() if isinstance(prompts, Tensor) else prompts)
            except TypeError:
                raise ValueError(
                    f"generate: prompts must be text, token ids or a list of either, got "
                    f"{type(prompts).__name__}; give a string or a list"
                ) from None
            if items and isinstance(items[0], int):
                items = [items]
        if settings.seed is None:  # drawn once: prompts that are the same get different answers
            settings = settings.model_copy(update={"seed": random.SystemRandom().getrandbits(48)})
        return [self.request(item, settings, index) for index, item in enumerate(items)]

    def _prompt_ids(self, item: Any, index: int) -> list[int]:
        """Token ids of a prompt, checked."""
        if isinstance(item, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"generate: prompts must be token ids, got text, and {self.folder} has no "
                    "tokenizer; give token ids or add its tokenizer files"
                )
            try:
                item.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"generate: prompt {index} must be valid text, got bytes that are not "
                    "UTF-8; convert it to UTF-8"
                ) from None
            prompt_ids = list(self.tokenizer(item).input_ids)
        elif isinstance(item, Sequence):
            prompt_ids = list(item)
        else:
            raise ValueError(
                f"generate: prompt {index} must be text or token ids, got {item!r}; give "
                "strings, or lists of integers"
            )
        self._check_prompt(prompt_ids, index, num_new=1)
        return prompt_ids

    def _check_prompt(
        self, token_ids: list[Any], index: int, num_new: int, call: str = "generate"
    ) -> None:
        limit = self._engine.limits.max_tokens
        if not token_ids:
            raise ValueError(
                f"{call}: prompt {index} must have a token at least, got none; write something"
            )
        if len(token_ids) + num_new > limit:
            raise ValueError(
                f"{call}: prompt {index} must be at most {limit - num_new} tokens long (the "
                f"context is {limit}), got {len(token_ids)}; shorten it or raise max_tokens"
            )
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < self._spec.vocab_size:
                raise ValueError(
                    f"{call}: token ids of prompt {index} must be integers 0 to "
                    f"{self._spec.vocab_size - 1}, got {token_id!r}; use this model's tokenizer"
                )

    def _run(self, requests: list[Request]) -> Generator[Token, None, list[Completion]]:
        speed = Speed(requests)
        for token in self.run(requests):
            speed.note(token.index)
            yield token
        return [
            Completion(
                prompt=self.tokenizer.decode(request.prompt_ids) if self.tokenizer else "",
                text=request.text.text,
                token_ids=request.token_ids,
                finish_reason=request.finish_reason or "",
                num_stages=len(self.plan.stages),
                num_micro_batches=self._engine.count_lanes(len(requests)),
                prefill_tokens_per_s=speed.prefill_tokens_per_s,
                decode_tokens_per_s=speed.decode_tokens_per_s,
                stages=self.stages,
            )
            for request in requests
        ]

    def _look_after_ranks(self) -> None:
        """A rank was lost while perhaps nobody waits: recovers, or ends the others."""
        try:
            self._engine.check()
        except Exception:  # remembered, for whoever calls next
            self._close_if_failed()

    def _close_if_failed(self) -> None:
        with self._closing:
            if self._engine.failed and not self._closed:
                self._closed = True
                atexit.unregister(self.shutdown)
                self._engine.pipeline.kill()

    def _running(self) -> _Running:
        return _Running(self)


class _Running:
    """A call on an open handle; a failure inside the pipeline closes the handle."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __enter__(self) -> None:
        failure = self.model._engine.failure
        if isinstance(failure, RankError):
            raise type(failure)(f"{failure}; load the model again, it stays closed", failure.rank)
        if self.model._closed:
            raise ValueError("generate: the model must be loaded, got one shut down; load it again")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.model._close_if_failed()
