"""Writes docs/settings.md from the fields of the settings: `python docs/settings.py`."""

import json
from pathlib import Path

from dist_int8.config import GenerationSettings, Settings
from dist_int8.config.generation_fields import HONOURED, NO_EFFECT, REFUSED

HEAD = """# Settings

Written by `python docs/settings.py` from `dist_int8/config`; a test keeps it true.

The same names are keys of a YAML file (`--config`), arguments of `dist_int8.load()` and, for most,
flags of `dist-int8 generate`. Flags and arguments win over the file. Unknown and duplicate keys are
refused; `null` is the default, as if the key were left out. `~` in a path is the home folder. Byte
sizes are written like `79GiB` (1024**3) or `80GB` (1000**3); a number without a unit is bytes, and
refused below 1 MiB. YAML reads `1e3` as text, so write `1000.0`. A setting that changes nothing, as
`max_recoveries` without `recover`, is named in one warning when the model is loaded. The flags of
every command: [command line](cli.md).
"""


def make_rows(settings: type[Settings] | type[GenerationSettings]) -> str:
    """Makes the table of a class of settings."""
    lines = ["| name | default | example | meaning |", "| --- | --- | --- | --- |"]
    for name, field in settings.model_fields.items():
        default, example = (
            value if isinstance(value, str) else json.dumps(value)
            for value in (field.default, (field.examples or [None])[0])
        )
        text = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{name}` | `{default}` | `{example}` | {text} |")
    return "\n".join(lines)


GENERATION = """Arguments of `model.generate()`, keys of a line of `generate --input` and, in
part, flags. A setting that is not given comes from `generation_config=`, a
transformers GenerationConfig, then from the model's own generation_config.json
(unless `model_defaults` is false). As in transformers, such a file samples only
with `do_sample`, and then with `top_k` 50 if it has none; a `temperature` given
as an argument decides alone, and 0 is greedy. `generate` prints what came from
the file, and the log has it (`-v`).

An answer ends with `finish_reason` "eos", "stop" (a stop string, or one of `stop_token_ids`,
which is then the last token), "length" (`max_new_tokens`, `max_length` or the context, which
prompt and answer fill together) or "time".
"""
CONFIG = """Every field of the installed transformers is in this table; a test keeps it so.
Honoured fields give the tokens that transformers gives, by its own logits processors.
The lists of one request (`suppress_tokens`, `bad_words_ids`, `sequence_bias` and the
like) hold at most 2,048 numbers together. A refused field is a `ValueError` that
names it, as is one that is in none of these rows; in a model's own file, fields that
transformers does not know are passed over.
"""


def make_fields() -> str:
    """Makes the table of the fields of a GenerationConfig."""
    lines = ["| field | here |", "| --- | --- |"]
    for name, ours in HONOURED.items():
        lines.append(f"| `{name}` | honoured{'' if name == ours else f', as `{ours}`'} |")
    lines += [f"| `{name}` | no effect: {reason} |" for name, reason in NO_EFFECT.items()]
    for name, (harmless, advice) in REFUSED.items():
        allowed = ", ".join(f"`{json.dumps(value)}`" for value in harmless)
        lines.append(f"| `{name}` | refused{f', except {allowed}' if allowed else ''}: {advice} |")
    return "\n".join(lines)


def make_page() -> str:
    """Makes the whole of docs/settings.md."""
    return (
        f"{HEAD}\n## Of a deployment\n\n{make_rows(Settings)}\n\n"
        f"## Of one generation\n\n{GENERATION}\n{make_rows(GenerationSettings)}\n\n"
        f"## Fields of a GenerationConfig\n\n{CONFIG}\n{make_fields()}\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(make_page())
