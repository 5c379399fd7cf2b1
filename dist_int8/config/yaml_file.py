"""Reading a YAML file of settings: duplicate keys are refused, every error names file and line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dist_int8.config.shipped import find_shipped


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself lets the last of two equal keys win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                raise ValueError(
                    f"{key_node.value}: {key_node.value} must be given once, got it on lines "
                    f"{seen[key_node.value]} and {line}; remove one of them"
                )
            seen[key_node.value] = line
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file.

    Raises:
        ValueError: no such file, bad syntax, a duplicate key, or a root that is no mapping.
    """
    if not isinstance(path, str | Path):
        raise ValueError(
            f"config: config must be the path of a YAML file, got {path!r}; give settings by name"
        )
    try:
        text = Path(find_shipped(path)).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{path}: config must be a YAML file, got no such file; check the path"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: config must be a readable UTF-8 YAML file, got {_flat(error)}; check the path"
        ) from None
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        problem = getattr(error, "problem", None) or _flat(error)
        raise ValueError(
            f"{where}: config must be valid YAML, got {problem}; correct that line"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}:{error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: config must be a mapping of settings, got {type(values).__name__}; "
            'write lines like "stages: 2"'
        )
    return values


def write_yaml(path: str | Path, values: Mapping[str, Any], comment: str) -> None:
    """Writes values, in their order, under a comment.

    Raises:
        ValueError: the file cannot be written.
    """
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    body = yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=100)
    try:
        Path(path).write_text(f"{head}\n{body}", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path}: config must be a file that can be written, got {error.strerror}; "
            "check the path"
        ) from None


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def syntax_error(path: Path) -> str | None:
    """Says in one line what is wrong with a YAML file of any content and tags; None if nothing."""
    try:
        for _ in yaml.parse(path.read_text(encoding="utf-8")):
            pass
    except (OSError, ValueError, yaml.YAMLError) as error:
        return _flat(error)
    return None
