"""Writes docs/settings.md from the fields of the settings: `python docs/settings.py`."""

import json
from pathlib import Path

from dist_int8.config import GenerationSettings, Settings

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


def make_page() -> str:
    """Makes the whole of docs/settings.md."""
    return (
        f"{HEAD}\n## Of a deployment\n\n{make_rows(Settings)}\n\n"
        "## Of one generation\n\nArguments of `model.generate()` and flags.\n\n"
        f"{make_rows(GenerationSettings)}\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(make_page())
