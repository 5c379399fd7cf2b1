"""Answers a file of prompts into another file, for `dist-int8 generate --input`."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dist_int8.api.model import Model
from dist_int8.api.prompts import PromptEncoder
from dist_int8.cli.answers import Display, load_model
from dist_int8.cli.plural import count
from dist_int8.cli.prompt_file import Answers, Item
from dist_int8.cli.talk import Talk
from dist_int8.config import Settings
from dist_int8.engine import Request, Token


def answer_file(
    settings: Settings,
    items: Sequence[Item],
    output: Path,
    talk: Talk,
    display: Display,
    stdout: TextIO,
) -> bool:
    """Loads the model and answers a file of prompts into `output`, each when it is done.

    Ranks above 0 only serve their stage.

    Returns:
        Whether every line has an answer.
    """
    with contextlib.ExitStack() as stack:
        answers = stack.enter_context(Answers(output, items)) if items else None
        if len(answers.done if answers else ()) == len(items) and "RANK" not in os.environ:
            print(
                f"{output} has {count(len(items), 'answer')} already, one per line",
                file=sys.stderr,
                flush=True,
            )
            return True
        batch = Batch(settings, items, answers, talk)
        try:
            model = stack.enter_context(load_model(settings, display, batch.check))
            batch.run(model, display.quiet)
            if display.trace is not None:
                model.trace.save(display.trace)
        except ValueError:
            if not batch.all_fail:
                raise
            batch.fail_all()
        figures = batch.count()
    if display.as_json:
        stdout.write(json.dumps(figures) + "\n")
        stdout.flush()
    if not display.quiet:
        print(_format_figures(figures), file=sys.stderr, flush=True)
    if figures["errors"]:
        print(
            f"{figures['errors']} of {count(figures['requests'], 'line')} could not be answered; "
            "see `error` in "
            f"{output}, and run again to retry them",
            file=sys.stderr,
            flush=True,
        )
    return not figures["errors"]


class Batch:
    """One run over the items of a file that have no answer yet.

    Args:
        settings: of the model.
        items: all items of the file.
        answers: the output, which knows what is answered already; None on ranks above 0.
        talk: how prompts become chats.

    Attributes:
        all_fail: whether no line that is left can be answered.
    """

    def __init__(
        self, settings: Settings, items: Sequence[Item], answers: Answers | None, talk: Talk
    ) -> None:
        self._settings, self._items, self._answers, self._talk = settings, items, answers, talk
        done = answers.done if answers else ()
        self._left = [item for item in items if item.id not in done]
        self._running: dict[int, tuple[Item, Request]] = {}
        self._num_prompt_tokens = self._num_tokens = self._num_errors = 0
        self._begin, self._seconds = 0.0, 0.0
        self.all_fail = False
        self._model: Model | None = None
        self._encoder: PromptEncoder
        self._bar: tqdm[Any] | None = None

    def check(self, encoder: PromptEncoder) -> None:
        """Looks for a line that can be answered, before weights are read for nothing.

        Raises:
            ValueError: there is none; `all_fail` is set then.
        """
        self._encoder = encoder
        for item in self._left:
            with contextlib.suppress(ValueError):
                self._make_request(item)
                return
        self.all_fail = True
        raise ValueError("no line that is left can be answered")

    def fail_all(self) -> None:
        """Notes the errors of all lines that are left; none can be answered."""
        for _ in self._make_requests():
            raise AssertionError("a line can be answered after all")

    def run(self, model: Model, quiet: bool) -> None:
        """Answers the items, with a bar on stderr unless `quiet`."""
        self._model = model
        num_items = len(self._items)
        self._bar = tqdm(
            total=num_items,
            initial=num_items - len(self._left),
            unit="prompt",
            disable=quiet,
            leave=False,
        )
        self._begin = time.perf_counter()
        with self._bar:
            for token in model.run(self._make_requests(), keep_going=True):
                self._num_tokens += 1
                if token.finish_reason is not None:
                    self._finish(token)
            for item, request in self._running.values():  # those ended without a last token
                self._fail(item, request.error or "it was cancelled")
        self._seconds = time.perf_counter() - self._begin

    def count(self) -> dict[str, Any]:
        """Returns the figures of the run."""
        return {
            "requests": len(self._items),
            "answered_before": len(self._items) - len(self._left),
            "errors": self._num_errors,
            "prompt_tokens": self._num_prompt_tokens,
            "tokens": self._num_tokens,
            "seconds": self._seconds,
            "tokens_per_s": self._num_tokens / self._seconds if self._seconds else 0.0,
            **(self._describe_model(self._model) if self._model else {}),
        }

    def _describe_model(self, model: Model) -> dict[str, Any]:
        return {
            "utilisation": model.trace.utilisation(),
            "num_stages": len(model.plan.stages),
            "num_micro_batches": model.num_micro_batches,
            "stages": model.stages,
        }

    def _make_requests(self) -> Iterator[Request]:
        for item in self._left:
            try:
                request = self._make_request(item)
            except ValueError as error:
                self._fail(item, error)
                continue
            self._running[item.index] = (item, request)
            yield request

    def _make_request(self, item: Item) -> Request:
        """Makes the request of a line; a ValueError says why it cannot be answered."""
        if item.error is not None:
            raise ValueError(item.error)
        prompt, encoder = item.content, self._encoder
        if item.kind == "prompt":
            prompt = self._talk.make_prompt(prompt, encoder, self._settings.random_weights)
        try:
            return encoder.make_request(prompt, encoder.complete(item.settings), item.index)
        except ValueError as error:
            raise ValueError(f"{item.place}: {error}") from None

    def _finish(self, token: Token) -> None:
        item, request = self._running.pop(token.index)
        self._num_prompt_tokens += len(request.prompt_ids)
        assert self._answers is not None and self._bar is not None
        self._answers.add(
            item,
            text=request.text.text,
            token_ids=request.token_ids,
            finish_reason=token.finish_reason,
        )
        seconds = time.perf_counter() - self._begin
        self._bar.set_postfix_str(f"{self._num_tokens / seconds:.1f} tokens/s", refresh=False)
        self._bar.update()

    def _fail(self, item: Item, error: object) -> None:
        assert self._answers is not None
        self._num_errors += 1
        self._answers.add(item, error=str(error))
        if self._bar is not None:
            self._bar.update()


def _format_figures(figures: dict[str, Any]) -> str:
    """Formats the speed and how busy each stage was as one line."""
    before = f" ({figures['answered_before']} before)" if figures["answered_before"] else ""
    shares = ", ".join(
        f"stage {rank} busy {share:.0%}"
        for rank, share in enumerate(figures.get("utilisation", ()))
    )
    return (
        f"{count(figures['requests'], 'prompt')}{before}: "
        f"{count(figures['prompt_tokens'], 'token')} read, "
        f"{figures['tokens']} written in {figures['seconds']:.1f} s, "
        f"{figures['tokens_per_s']:.1f} tokens/s; {shares or 'nothing to do'}"
    )
