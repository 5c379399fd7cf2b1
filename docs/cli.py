"""Writes docs/cli.md from the commands themselves: `python docs/cli.py`."""

from pathlib import Path
from typing import Any

import typer

from dist_int8.cli.app import app
from dist_int8.cli.exit_codes import BAD_INPUT, DOES_NOT_FIT, FAILED, INTERRUPTED
from dist_int8.launcher import signals

HEAD = f"""# Command line

Written by `python docs/cli.py` from `dist_int8/cli`; a test keeps it true. `dist-int8 COMMAND --help` shows the same
flags with examples.

Flags that stand for a [setting](settings.md) win over the YAML file of `--config`. One of `--device`, `--stages`,
`--gpus` and `--devices` replaces the whole layout of the file. A flag of one value is given once, and not empty; `~` in
a path is the home folder. In `--stop`, `\\n`, `\\t`, `\\r` and `\\uXXXX` are what they are in JSON, and `\\\\` is a
backslash: `--stop '\\n'` ends an answer at a newline.

## stdout, stderr and the log

Text, tables and JSON that a command was asked for go to stdout; plans, progress, figures and the log go to stderr.
`-v` logs information and `-vv` debugging output, on every rank; `-q` shows no progress and logs errors only, and
excludes `-v`. What a command was asked for is on stdout either way; a stdout that is closed is refused. Without either, the
environment variable `DIST_INT8_LOG` names the level: `debug`, `info`, `warning` (the default) or `error`.

## Exit codes

| code | meaning |
| --- | --- |
| 0 | success |
| {FAILED} | something went wrong while running, or some lines of `--input` have no answer; in `plan`, bad input; in `doctor`, something required is broken |
| {BAD_INPUT} | bad input: one line on stderr says what to change |
| {DOES_NOT_FIT} in `plan` | the model does not fit; the output says what would |
| {INTERRUPTED} | interrupted by Ctrl-C |
| {signals.EXIT_CODE} | ended by SIGTERM, after running answers were finished |

`launch` returns the exit code of the rank that failed. An error is one line, `error: ...`; `DIST_INT8_DEBUG=1` shows
the traceback instead.

## JSON of `generate`

`generate --json` prints one object per prompt, in the order of the prompts:

| key | value |
| --- | --- |
| `prompt` | the prompt as given, before any chat template |
| `text`, `token_ids` | the answer |
| `finish_reason` | why it ended: `eos`, `stop` (a stop string), `length` or `cancelled` |
| `num_stages`, `num_micro_batches` | how the model ran |
| `prefill_tokens_per_s`, `decode_tokens_per_s` | speed of the run |
| `stages` | list of `{{rank, device, blocks: [first, last], bytes}}` |

With `--input` it prints one object for the whole run instead: `requests`, `answered_before` (by earlier runs),
`errors`, `prompt_tokens`, `tokens`, `seconds`, `tokens_per_s`, `utilisation` (the busy share of each stage),
`num_stages`, `num_micro_batches` and `stages`.

## JSON lines of `--input` and `--output`

A line of `--input` is an object with exactly one of

- `prompt`: text,
- `token_ids`: a list of integers,
- `messages`: a list of `{{"role": ..., "content": ...}}` for the model's chat template,

and optionally an `id` (text or an integer; by default the number of the line) and settings for this line alone:
`max_new_tokens`, `temperature`, `seed`, `stop` and the other settings [of one generation](settings.md#of-one-generation).
Ids must differ. Empty lines are skipped.

```json
{{"prompt": "The capital of France is", "max_new_tokens": 8}}
{{"id": "chat-1", "messages": [{{"role": "user", "content": "Who are you?"}}], "temperature": 0.7, "seed": 1}}
```

A line of `--output` is appended as soon as its answer is complete, in any order, with the same `id`. It has either
`text`, `token_ids` and `finish_reason`, or `error`; a line that cannot be answered stops no other, and the exit code is
then {FAILED}. `request` is a fingerprint of everything that decides the answer. After a kill, the same command continues
where the file ends and tries lines with an `error` again; a file with answers to other prompts or other settings is
refused.

## JSON of `plan`

| key | value |
| --- | --- |
| `fits` | whether the model fits |
| `model`, `num_blocks` | as asked, and its number of transformer blocks |
| `block_bytes`, `model_bytes`, `kv_bytes_per_token` | sizes of one block, of the whole model, and of one token in the KV cache |
| `kv_tokens` | number of tokens that the KV cache has room for |
| `ms_per_token` | predicted milliseconds of a token of each sequence in flight, half full: the sum of the stages' `ms` |
| `ms_per_token_alone` | the same for one sequence of 128 tokens that runs alone |
| `stages` | list of `{{rank, host, device, blocks, bytes: {{weights, kv, activations, reserve, free}}, ms}}` |
| `missing_bytes`, `suggestions` | if it does not fit: how much is missing, and changes that would make it fit |

`--save plan.yaml` writes settings for `--config` and `load(config=)`. More in [planning](planning.md).
"""  # noqa: E501 - rows of tables


def make_page() -> str:
    """Makes the whole of docs/cli.md."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    sections = [f"## dist-int8 {name}\n\n{describe(command)}" for name, command in commands.items()]
    return HEAD + "\n" + "\n".join(sections)


def describe(command: Any) -> str:
    """Describes a command: its first sentence, its arguments, and a table of flags per panel."""
    summary = command.help.split("\n\n")[0].replace("\n", " ").strip()
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        title = getattr(parameter, "rich_help_panel", None) or ""
        panels.setdefault(title, []).append(make_row(parameter))
    tables = [
        f"| {title or 'flag'} | |\n| --- | --- |\n" + "\n".join(rows)
        for title, rows in panels.items()
    ]
    return "\n\n".join([summary, *tables]) + "\n"


def make_row(parameter: Any) -> str:
    """Makes the row of one flag or argument: its spellings, and its help with the default."""
    if parameter.opts[0].startswith("-"):
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    else:
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    text = " ".join((parameter.help or "").split())
    is_flag = isinstance(parameter.default, bool)
    if (
        parameter.show_default is True
        and not is_flag
        and not parameter.required
        and parameter.default is not None
    ):
        text = f"{text} (default: {parameter.default})"
    return f"| {names} | {text.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(make_page())
