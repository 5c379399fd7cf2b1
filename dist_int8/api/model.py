"""The handle of a loaded model: generate, logits, tokenizer, plan, shutdown."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor
from transformers import GenerationConfig

from dist_int8.api.keywords import GenerationKeywords
from dist_int8.api.prompt_list import Encoding, Ids, Prompt, Prompts
from dist_int8.api.prompts import PromptEncoder
from dist_int8.config import GenerationSettings, Settings
from dist_int8.engine import Completion, Engine, Request, Speed, Token
from dist_int8.errors import RankError, ShuttingDownError
from dist_int8.models import ModelSpec
from dist_int8.partition import Plan
from dist_int8.pipeline import schedule
from dist_int8.pipeline.trace import Trace

TokenStream = Generator[Token, None, list[Completion]]
LogitsStream = Generator[tuple[int, int, Tensor], None, None]


class Model:
    """A loaded model. Use it as a context manager, or call `shutdown` when done.

    Attributes:
        plan: what each stage holds.
        settings: how it was loaded.
        folder: folder of the checkpoint.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        plan: Plan,
        settings: Settings,
        encoder: PromptEncoder,
        spec: ModelSpec,
    ) -> None:
        self.plan = plan
        self.settings = settings
        self.folder = encoder.folder
        self._spec = spec
        self._engine = engine
        self._encoder = encoder
        # When the last reference goes, and at the end of the session, whichever comes first. The
        # engine does not know the handle, so nothing but the session keeps that alive.
        weakref.finalize(self, engine.close)
        world = engine.pipeline.world
        if world.monitor is not None:
            world.monitor.on_loss = engine.notice_loss

    def __repr__(self) -> str:
        stages = ", ".join(
            f"{stage.device}: blocks {stage.first_block}-{stage.last_block}"
            for stage in self.plan.stages
        )
        closed = ", closed" if self._engine.closed else ""
        return f"<Model {self._spec.model_type} {str(self.folder)!r}, {stages}{closed}>"

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model, or None if its folder has none."""
        return self._encoder.tokenizer

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

    @overload
    def generate(
        self,
        prompts: Prompts,
        *,
        generation_config: GenerationConfig | None = None,
        on_token: Callable[[Token], None] | None = None,
        stream: Literal[False] = False,
        **settings: Unpack[GenerationKeywords],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Prompts,
        *,
        generation_config: GenerationConfig | None = None,
        on_token: Callable[[Token], None] | None = None,
        stream: Literal[True],
        **settings: Unpack[GenerationKeywords],
    ) -> TokenStream: ...

    def generate(
        self,
        prompts: Prompts,
        *,
        generation_config: GenerationConfig | None = None,
        on_token: Callable[[Token], None] | None = None,
        stream: bool = False,
        **settings: Unpack[GenerationKeywords],
    ) -> list[Completion] | TokenStream:
        """Answers one prompt or many. Calls from several threads share the pipeline.

        Args:
            prompts: one prompt or a list of them. A prompt is text, a chat (a list of dicts with
                role and content, put into the model's chat template), token ids (a list, array or
                tensor), or what a tokenizer returns.
            generation_config: transformers' settings; what cannot be honoured is refused by name.
            on_token: called with every `Token` as it arrives.
            stream: return an iterator of `Token` instead; the value of its StopIteration is the
                list of completions.
            **settings: fields of `GenerationSettings` (max_new_tokens, temperature, top_p, seed,
                stop, ...); they win over generation_config, and that over the model's
                generation_config.json. Greedy unless temperature is above 0 or do_sample is true.
                Prompt i samples with seed + i.

        Returns:
            A list of `Completion`, one per prompt.

        Raises:
            ValueError: a bad setting, an empty prompt, or one longer than the context.
            QueueFullError: too many requests of other calls wait already.
            RankError: a rank ended; the handle is closed then.
            RequestError: the model's logits are NaN.
            ShuttingDownError: the model was shut down before the last token.
        """
        if not isinstance(stream, bool):
            raise ValueError(
                f"generate: stream must be true or false, got {stream!r}; a callback is on_token"
            )
        if on_token is not None and (stream or not callable(on_token)):
            got = "stream as well" if stream else type(on_token).__name__
            raise ValueError(
                f"generate: on_token must be a function, and without stream, got {got}; the "
                "iterator that stream returns yields the same tokens"
            )
        chosen = self._encoder.choose(generation_config, settings)
        tokens = self._stream(self._encoder.make_requests(prompts, chosen))
        if stream:
            return tokens
        try:
            with closing(tokens):  # even while the traceback of an exception still refers to it
                while True:
                    try:
                        token = next(tokens)
                    except StopIteration as stop:
                        return stop.value
                    if on_token is not None:
                        on_token(token)
        finally:
            del self  # here and below: a notebook keeps the last traceback, not this handle

    def request(self, prompt: Prompt, settings: GenerationSettings, index: int = 0) -> Request:
        """Makes a request of one prompt with settings of its own, for `run`.

        Args:
            prompt: text, a chat, token ids, or what a tokenizer returns for one prompt.
            settings: how its tokens are chosen and when it ends; what was not given comes from the
                model's generation_config.json.
            index: tells its tokens apart from those of other prompts; it samples with seed + index.

        Raises:
            ValueError: an empty prompt, one longer than the context, or invalid token ids.
        """
        return self._encoder.make_request(prompt, self._encoder.complete(settings), index)

    def run(self, requests: Iterable[Request], keep_going: bool = False) -> Iterator[Token]:
        """Answers requests made by `request`, taken as there is room; yields tokens as they arrive.

        Args:
            requests: any number, made lazily if need be.
            keep_going: a request that fails by itself (its logits are NaN) has its `error` set and
                does not end the others.

        Raises:
            QueueFullError: too many requests of other calls wait already.
            RankError: a rank ended; the handle is closed then.
            RequestError: the model's logits are NaN.
            ShuttingDownError: the model was shut down before the last token.
        """
        self._check_open()
        try:
            yield from self._engine.run(requests, keep_going)
        finally:
            del self

    @property
    def num_micro_batches(self) -> int:
        """Lanes of the engine: the micro-batches in flight when there is enough to do."""
        return self._engine.num_micro_batches

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens in a sequence, prompt and answer together."""
        return self._engine.limits.max_tokens

    @property
    def trace(self) -> Trace:
        """When each stage worked on which micro-batch since the model was loaded."""
        return self._engine.pipeline.trace

    def logits(self, input_ids: Ids | Sequence[Ids] | Encoding) -> Tensor:
        """Computes logits fp32 [batch, tokens, vocab] of token ids [batch, tokens], on the CPU.

        Raises:
            ValueError: not two-dimensional, empty, longer than the context, or an invalid token id.
            RankError: a rank ended; the handle is closed then.
        """
        rows = self._encoder.check_rows(input_ids)
        pieces = self.iter_logits(rows.tolist())
        logits = torch.empty(*rows.shape, self._spec.vocab_size, dtype=torch.float32)
        try:
            with closing(pieces):
                for index, start, values in pieces:
                    logits[index, start : start + values.shape[0]] = values
            return logits
        finally:
            del self

    def iter_logits(self, sequences: Sequence[Ids] | Encoding) -> LogitsStream:
        """Computes logits of token ids of any lengths piece by piece, so that memory stays bounded.

        Short sequences share a micro-batch. Other calls may run between two pieces; one that needs
        a slot that this one has takes it, and the sequence under way is then prefilled again.

        Returns:
            An iterator of (sequence, first position, logits fp32 [tokens, vocab] on the CPU), in
            order, every position once.

        Raises:
            ValueError: a sequence is empty, longer than the context, or has an invalid token id.
            RankError: a rank ended; the handle is closed then.
        """
        return self._iter_logits(self._encoder.check_sequences(sequences))

    def _iter_logits(self, sequences: list[list[int]]) -> LogitsStream:
        self._check_open()
        try:
            yield from self._engine.logits(sequences)
        finally:
            del self

    def logits_of(self, sequences: Sequence[Sequence[int]]) -> LogitsStream:
        """The former name of `iter_logits`."""
        warnings.warn(
            "Model.logits_of is called iter_logits now; the old name will go in the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.iter_logits(sequences)

    def schedule(self, num_prompts: int = 1, num_decode_steps: int = 4) -> str:
        """Draws the order of work, one line per stage, for a number of short prompts."""
        grid = schedule.build(
            len(self.plan.stages),
            self._engine.count_lanes(num_prompts),
            num_prefill_chunks=1,
            num_decode_steps=num_decode_steps,
        )
        return schedule.draw(grid)

    def shutdown(self) -> None:
        """Ends every stage and its process, and frees their memory. Safe to call twice.

        It also happens when the last reference to the handle goes, and when the session ends.
        Calls of other threads that are under way get `ShuttingDownError`; `drain` lets them end
        first. In a forked child it does nothing: the stages are its parent's.
        """
        self._engine.close()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Shuts down in an orderly way: running prompts get their answers first.

        Prompts without a KV slot yet, and calls that come, get `ShuttingDownError`. It may be
        called from any thread but that of a `generate` under way, which could not go on meanwhile.

        Args:
            timeout_s: seconds to wait; what still runs then gets `ShuttingDownError` too. By
                default the setting drain_timeout.

        Returns:
            Whether everything that ran got its answer.
        """
        if not self._engine.pipeline.world.owner.is_here:
            return True
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
                "the model was shut down: the answer did not end within the drain timeout of "
                f"{timeout_s:g} s"
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

    def _stream(self, requests: list[Request]) -> TokenStream:
        speed = Speed(requests)
        try:
            for token in self.run(requests):
                speed.note(token.index)
                yield token
            return [self._complete(request, speed, len(requests)) for request in requests]
        finally:
            del self

    def _complete(self, request: Request, speed: Speed, num_requests: int) -> Completion:
        """Makes the answer of a request that ended, one of num_requests in its call."""
        return Completion(
            prompt=self._encoder.show(request),
            text=request.text.text,
            token_ids=request.token_ids,
            finish_reason=request.finish_reason or "",
            num_stages=len(self.plan.stages),
            num_micro_batches=self._engine.count_lanes(num_requests),
            prefill_tokens_per_s=speed.prefill_tokens_per_s,
            decode_tokens_per_s=speed.decode_tokens_per_s,
            stages=self.stages,
        )

    def _check_open(self) -> None:
        self._engine.pipeline.world.owner.check()
        failure = self._engine.failure
        if isinstance(failure, RankError):
            raise type(failure)(f"{failure}; load the model again, it stays closed", failure.rank)
        if self._engine.closed:
            raise ShuttingDownError("the model is shut down; call load() again")
