"""Loads the model, answers prompts and shows the answers, for `dist-int8 generate`."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from dist_int8.api.load import load
from dist_int8.api.model import Model
from dist_int8.cli.plural import count
from dist_int8.config import GenerationSettings, Settings
from dist_int8.engine import Completion, Token
from dist_int8.launcher import signals
from dist_int8.partition import Plan

MEBIBYTE = 1024**2
SHOWN_DECODE_STEPS = 4
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
    """What to show: JSON or text on stdout, plan, schedule and figures on stderr, a trace."""

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
    """Loads the model, answers the prompts and prints. Ranks above 0 only serve their stage."""

    with load_model(settings, display) as model:
        if display.show_schedule:
            print(_draw_schedule(model, len(prompts), generation), file=sys.stderr, flush=True)
        streaming = display.stream and len(prompts) == 1

        def show_token(token: Token) -> None:
            stdout.write(token.text)
            stdout.flush()

        completions = model.generate(
            [make_prompt(model, prompt, chat) for prompt in prompts],
            on_token=show_token if streaming else None,
            **generation.model_dump(exclude_unset=True),
        )
        if display.as_json:
            for prompt, completion in zip(prompts, completions, strict=True):
                stdout.write(format_json(prompt, completion) + "\n")
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
            print(format_speed(completions, model.plan), file=sys.stderr, flush=True)


def _draw_schedule(model: Model, num_prompts: int, generation: GenerationSettings) -> str:
    """Draws the first decode steps, at most as many as there will be: prefill gives one token."""
    num_steps = min(SHOWN_DECODE_STEPS, generation.max_new_tokens - 1)
    all_of_them = generation.max_new_tokens - 1
    return (
        f"schedule: prefill and the first {num_steps} of up to {count(all_of_them, 'decode step')}"
        f"\n{model.schedule(num_prompts, num_steps)}"
    )


def load_model(settings: Settings, display: Display) -> Model:
    """Loads the model, which SIGTERM drains from then on; does not return on ranks above 0."""

    def show_plan(plan: Plan) -> None:
        if not display.quiet:
            print(f"{plan.table()}\n{plan.prediction()}", file=sys.stderr, flush=True)

    if os.environ.get("RANK", "0") != "0":
        signals.leave_term_to_rank_0(settings.drain_timeout)
    model = load(
        **settings.model_dump(exclude_none=True), progress=not display.quiet, on_plan=show_plan
    )
    signals.drain_on_term(model.drain)
    return model


def format_json(prompt: str, completion: Completion) -> str:
    """Formats an answer as one line of JSON; `prompt` is as given, before any chat template."""
    values = asdict(completion) | {"prompt": prompt}
    return json.dumps({key: values[key] for key in JSON_KEYS}, ensure_ascii=False)


def format_speed(completions: Sequence[Completion], plan: Plan) -> str:
    """Formats the speed, and the bytes of every stage against fp32, as one line."""
    first = completions[0]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    stages = ", ".join(
        f"stage {stage.rank} {stage.bytes / MEBIBYTE:.1f} MiB "
        f"({stage.float_bytes / MEBIBYTE:.1f} in fp32)"
        for stage in plan.stages
    )
    ratio = sum(s.float_bytes for s in plan.stages) / sum(s.bytes for s in plan.stages)
    return (
        f"{count(num_tokens, 'token')}: prefill {first.prefill_tokens_per_s:.1f} tokens/s, "
        f"decode {first.decode_tokens_per_s:.1f} tokens/s; {stages}: {ratio:.1f} times smaller"
    )


def make_prompt(model: Model, prompt: str, chat: bool) -> Any:
    """Returns a prompt as the model takes it: the text, or token ids of the chat template."""
    if chat:
        return apply_chat_template(model, [{"role": "user", "content": prompt}])
    if model.settings.random_weights and model.tokenizer is None:
        return list(prompt.encode())  # a rehearsal from config.json alone: any ids will do
    return prompt


def apply_chat_template(model: Model, messages: list[dict[str, Any]]) -> Any:
    """Returns the token ids of messages in the chat template; ValueError if they do not fit."""
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
    except Exception as error:  # a template is a program and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"dist-int8 generate:messages: messages must fit the chat template, got {reason}; "
            'write them like {"role": "user", "content": "Hi"}'
        ) from None
