"""Loads the model, answers prompts and shows the answers, for `dist-int8 generate`."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from dist_int8.api.load import load
from dist_int8.api.model import Model
from dist_int8.api.prompts import PromptEncoder
from dist_int8.cli.plural import count
from dist_int8.cli.talk import Talk
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
    talk: Talk,
    display: Display,
    stdout: TextIO,
) -> None:
    """Loads the model, answers the prompts and prints. Ranks above 0 only serve their stage."""
    given = generation.model_dump(exclude_unset=True)
    asked: list[Any] = []

    def check(encoder: PromptEncoder) -> None:
        asked.extend(talk.make_prompt(p, encoder, settings.random_weights) for p in prompts)
        encoder.make_requests(asked, encoder.choose(None, given))
        if not display.quiet and (text := encoder.describe_defaults(generation)):
            print(text, file=sys.stderr, flush=True)

    with load_model(settings, display, check) as model:
        if display.show_schedule:
            print(_draw_schedule(model, len(prompts), generation), file=sys.stderr, flush=True)
        streaming = display.stream and len(prompts) == 1

        def show_token(token: Token) -> None:
            stdout.write(token.text)
            stdout.flush()

        completions = model.generate(asked, on_token=show_token if streaming else None, **given)
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


def load_model(
    settings: Settings, display: Display, check: Callable[[PromptEncoder], None]
) -> Model:
    """Loads the model, which SIGTERM drains from then on; does not return on ranks above 0.

    Args:
        settings: of the model.
        display: what to show.
        check: checks the prompts on rank 0, before a weight is read.
    """

    def show_plan(plan: Plan) -> None:
        if not display.quiet:
            lines = filter(None, (plan.table(), plan.numerics, plan.prediction()))
            print("\n".join(lines), file=sys.stderr, flush=True)

    if os.environ.get("RANK", "0") != "0":
        signals.leave_term_to_rank_0(settings.drain_timeout)
    model = load(
        **settings.model_dump(exclude_none=True),
        progress=not display.quiet,
        on_plan=show_plan,
        on_encoder=check,
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
