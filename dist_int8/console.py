"""What `dist-int8 generate` does once its flags are checked: load, answer, show."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from dist_int8.api import load
from dist_int8.config import GenerationSettings, Settings
from dist_int8.engine import Completion, Token
from dist_int8.handle import Model
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
    """What is shown: JSON or text on stdout, plan, schedule and figures on stderr."""

    as_json: bool
    show_schedule: bool
    stream: bool
    quiet: bool


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

    with load(
        **settings.model_dump(exclude_none=True), progress=not display.quiet, on_plan=show_plan
    ) as model:
        if display.show_schedule:
            print(model.schedule(len(prompts)), file=sys.stderr, flush=True)
        streaming = display.stream and len(prompts) == 1

        def show_token(token: Token) -> None:
            stdout.write(token.text)
            stdout.flush()

        completions = model.generate(
            [_as_prompt(model, prompt, chat) for prompt in prompts],
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
        if not display.quiet:
            print(closing_line(completions, model.plan), file=sys.stderr, flush=True)


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


def _as_prompt(model: Model, prompt: str, chat: bool) -> Any:
    if chat:
        return _in_chat_template(model, prompt)
    if model.settings.random_weights and model.tokenizer is None:
        return list(prompt.encode())  # a rehearsal from config.json alone: any ids will do
    return prompt


def _in_chat_template(model: Model, prompt: str) -> Any:
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            f"dist-int8 generate:chat: model must have a chat template, got none in "
            f"{model.folder}; leave --chat out"
        )
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
