"""Settings from a YAML file, with overrides laid over it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_int8.config.settings import Settings
from dist_int8.config.yaml_file import read_yaml


def load_settings(
    path: str | Path | None = None,
    *,
    source: str = "load()",
    flags: Mapping[str, str] | None = None,
    **overrides: Any,
) -> Settings:
    """Reads a YAML file of settings and lays the overrides that are not None over it.

    An override of `devices`, `gpus` or `stages` replaces all three of the file, since they say the
    same thing in three ways.

    Args:
        path: YAML file; None: the defaults.
        source: where the overrides come from, for errors about them.
        flags: spelling of those that were given as flags of the command line.
        overrides: values by name of the field.

    Raises:
        ValueError: one line that names file and key.
    """
    values = read_yaml(path) if path is not None else {}
    chosen = {name: value for name, value in overrides.items() if value is not None}
    if path is not None:
        Settings.from_values(values, str(path))
        layout = {"devices", "gpus", "stages"}
        if layout & chosen.keys():
            values = {key: value for key, value in values.items() if key not in layout}
    return Settings.from_values(values | chosen, source, flags)
