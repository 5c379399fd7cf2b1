"""What `dist-int8 generate` does once its flags are checked: load, answer, show."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dist_int8.api.load import load
from dist_int8.api.model import Model
from dist_int8.cli.prompt_file import Answers, Item
from dist_int8.config import GenerationSettings, Settings
from dist_int8.engine import Completion, Request, Token
from dist_int8.launcher import signals
from dist_int8.partition import Plan

MEBIBYTE = 1024**2
JSON_KEYS = (
    "prompt",
    "text",
    "token_ids",
    "finish_reason",
    "num_stages",
    "num_micro_batches",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "stages",
)


@dataclass(frozen=True)
class Display:
    """What is shown: JSON or text on stdout, plan, schedule and figures on stderr, a trace."""

    as_json: bool
    show_schedule: bool
    stream: bool
    quiet: bool
    trace: Path | None = None


def answer(
    settings: Settings,
    generation: GenerationSettings,
    prompts: Sequence[str],
    chat: bool,
    display: Display,
    stdout: TextIO,
) -> None:
    """Loads the model, answers the prompts, prints. Ranks above 0 only serve their stage."""

    def show_plan(plan: Plan) -> None:
        if not display.quiet:
            print(plan.table(), file=sys.stderr, flush=True)

    with _load(settings, display, show_plan) as model:
        if display.show_schedule:
            print(model.schedule(len(prompts)), file=sys.stderr, flush=True)
        streaming = display.stream and len(prompts) == 1

        def show_token(token: Token) -> None:
            stdout.write(token.text)
            stdout.flush()

        completions = model.generate(
            [as_prompt(model, prompt, chat) for prompt in prompts],
            on_token=show_token if streaming else None,
            **generation.model_dump(exclude_unset=True),
        )
        if display.as_json:
            for prompt, completion in zip(prompts, completions, strict=True):
                stdout.write(as_json(prompt, completion) + "\n")
        elif streaming:
            stdout.write("\n")
        else:
            for prompt, completion in zip(prompts, completions, strict=True):
                heading = f"=== {prompt}\n" if len(prompts) > 1 else ""
                stdout.write(f"{heading}{completion.text}\n")
        stdout.flush()
        if display.trace is not None:
            model.trace.save(display.trace)
        if not display.quiet:
            print(closing_line(completions, model.plan), file=sys.stderr, flush=True)


def answer_file(
    settings: Settings,
    items: Sequence[Item],
    output: Path,
    chat: bool,
    display: Display,
    stdout: TextIO,
) -> bool:
    """Loads the model and answers a file of prompts into `output`, as they are done.

    Ranks above 0 only serve their stage.

    Returns:
        Whether every line has an answer.
    """

    def show_plan(plan: Plan) -> None:
        if not display.quiet:
            print(plan.table(), file=sys.stderr, flush=True)

    with contextlib.ExitStack() as stack:
        answers = stack.enter_context(Answers(output, items)) if items else None
        if len(answers.done if answers else ()) == len(items) and "RANK" not in os.environ:
            print(f"{output} has all {len(items)} answers already", file=sys.stderr, flush=True)
            return True
        model = stack.enter_context(_load(settings, display, show_plan))
        assert answers is not None, "rank 0 has the items, and no other rank comes here"
        figures = _answer_items(model, items, answers, chat, display.quiet)
        if display.trace is not None:
            model.trace.save(display.trace)
    if display.as_json:
        stdout.write(json.dumps(figures) + "\n")
        stdout.flush()
    if not display.quiet:
        print(_batch_line(figures), file=sys.stderr, flush=True)
    if figures["errors"]:
        print(
            f"{figures['errors']} of {figures['requests']} lines have no answer; see `error` in "
            f"{output}, and run again to try them again",
            file=sys.stderr,
            flush=True,
        )
    return not figures["errors"]


def _answer_items(
    model: Model, items: Sequence[Item], answers: Answers, chat: bool, quiet: bool
) -> dict[str, Any]:
    """Answers what is not answered yet; figures of this run."""
    left = [item for item in items if item.id not in answers.done]
    running: dict[int, tuple[Item, Request]] = {}
    num_prompt_tokens = num_tokens = num_errors = 0
    bar = tqdm(
        total=len(items), initial=len(items) - len(left), unit="prompt", disable=quiet, leave=False
    )

    def failed(item: Item, error: object) -> None:
        nonlocal num_errors
        num_errors += 1
        answers.add(item, error=str(error))
        bar.update()

    def requests() -> Iterator[Request]:
        for item in left:
            if item.error is not None:
                failed(item, item.error)
                continue
            try:
                prompt = _make_prompt(model, item, chat)
                request = model.request(prompt, item.settings, item.index)
            except ValueError as error:
                failed(item, f"{item.place}: {error}")
                continue
            running[item.index] = (item, request)
            yield request

    started = time.perf_counter()
    with bar:
        for token in model.run(requests(), keep_going=True):
            num_tokens += 1
            if token.finish_reason is None:
                continue
            item, request = running.pop(token.index)
            num_prompt_tokens += len(request.prompt_ids)
            answers.add(
                item,
                text=request.text.text,
                token_ids=request.token_ids,
                finish_reason=token.finish_reason,
            )
            seconds = time.perf_counter() - started
            bar.set_postfix_str(f"{num_tokens / seconds:.1f} tokens/s", refresh=False)
            bar.update()
        for item, request in running.values():  # they ended without a last token
            failed(item, request.error or "it was cancelled")
    seconds = time.perf_counter() - started
    return {
        "requests": len(items),
        "answered_before": len(items) - len(left),
        "errors": num_errors,
        "prompt_tokens": num_prompt_tokens,
        "tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "utilisation": model.trace.utilisation(),
        "num_stages": len(model.plan.stages),
        "num_micro_batches": model.num_micro_batches,
        "stages": model.stages,
    }


def _make_prompt(model: Model, item: Item, chat: bool) -> Any:
    if item.kind == "messages":
        return _in_chat_template(model, item.content)
    return as_prompt(model, item.content, chat) if item.kind == "prompt" else item.content


def _batch_line(figures: dict[str, Any]) -> str:
    """Speed and how busy each stage was, in one line."""
    before = f" ({figures['answered_before']} before)" if figures["answered_before"] else ""
    shares = ", ".join(
        f"stage {rank} busy {share:.0%}" for rank, share in enumerate(figures["utilisation"])
    )
    return (
        f"{figures['requests']} prompts{before}: {figures['prompt_tokens']} tokens read, "
        f"{figures['tokens']} written in {figures['seconds']:.1f} s, "
        f"{figures['tokens_per_s']:.1f} tokens/s; {shares or 'nothing to do'}"
    )


def _load(settings: Settings, display: Display, on_plan: Callable[[Plan], None]) -> Model:
    """The model, which SIGTERM drains from now on; ranks above 0 do not return."""
    if os.environ.get("RANK", "0") != "0":
        signals.leave_term_to_rank_0(settings.drain_timeout)
    model = load(
        **settings.model_dump(exclude_none=True), progress=not display.quiet, on_plan=on_plan
    )
    signals.drain_on_term(model.drain)
    return model


def as_json(prompt: str, completion: Completion) -> str:
    """One line of JSON; `prompt` is what the user wrote, before any chat template."""
    values = asdict(completion) | {"prompt": prompt}
    return json.dumps({key: values[key] for key in JSON_KEYS}, ensure_ascii=False)


def closing_line(completions: Sequence[Completion], plan: Plan) -> str:
    """Speed, and bytes of every stage against fp32, in one line."""
    first = completions[0]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    stages = ", ".join(
        f"stage {stage.rank} {stage.bytes / MEBIBYTE:.1f} MiB "
        f"({stage.float_bytes / MEBIBYTE:.1f} in fp32)"
        for stage in plan.stages
    )
    ratio = sum(s.float_bytes for s in plan.stages) / sum(s.bytes for s in plan.stages)
    return (
        f"{num_tokens} tokens: prefill {first.prefill_tokens_per_s:.1f} tokens/s, "
        f"decode {first.decode_tokens_per_s:.1f} tokens/s; {stages}: {ratio:.1f} times smaller"
    )


def as_prompt(model: Model, prompt: str, chat: bool) -> Any:
    """What the model takes for a prompt: itself, or its ids within the chat template."""
    if chat:
        return _in_chat_template(model, [{"role": "user", "content": prompt}])
    if model.settings.random_weights and model.tokenizer is None:
        return list(prompt.encode())  # a rehearsal from config.json alone: any ids will do
    return prompt


def _in_chat_template(model: Model, messages: list[dict[str, Any]]) -> Any:
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            f"dist-int8 generate:chat: model must have a chat template, got none in "
            f"{model.folder}; leave --chat and messages out"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template is a program, and raises what it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"dist-int8 generate:messages: messages must fit the chat template, got {reason}; "
            'write them like {"role": "user", "content": "Hi"}'
        ) from None
