"""Reading a YAML file of settings: duplicate keys are refused, every error names file and line."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dist_int8.config.checked import show
from dist_int8.config.shipped import find_shipped

MAX_BYTES = 2**20
MAX_NODES = 20_000  # a list of blocks of the largest model is far below


class _DuplicateError(ValueError):
    pass


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself lets the last of two equal keys win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                raise _DuplicateError(
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
    if not isinstance(path, str | Path) or path in ("", Path()):
        raise ValueError(
            f"config: config must be the path of a YAML file, got {show(path)}; give settings by "
            "name"
        )
    text = _read_text(Path(find_shipped(os.path.expanduser(path))))
    values = _parse(text, path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: config must be a mapping of settings, got {type(values).__name__}; "
            'write lines like "stages: 2"'
        )
    return values


def _read_text(path: Path) -> str:
    """Reads a file that must be small, whatever it is: /dev/zero has no end."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(
            f"{path}: config must be a YAML file, got no such file; check the path"
        ) from None
    except (OSError, ValueError) as error:  # of an encoding and of a path with a NUL byte too
        reason = getattr(error, "strerror", None) or _flat(error)
        raise ValueError(
            f"{path}: config must be a readable UTF-8 YAML file, got {reason}; check the path"
        ) from None


def _parse(text: str, path: str | Path) -> Any:
    try:
        loader = _UniqueKeyLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if _count_nodes(root, {}) > MAX_NODES:
            raise ValueError(
                f"{path}: config must be a short mapping, got more than {MAX_NODES} values through "
                "its aliases; write them out"
            )
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        problem = getattr(error, "problem", None) or _flat(error)
        raise ValueError(
            f"{where}: config must be valid YAML, got {problem}; correct that line"
        ) from None
    except _DuplicateError as error:
        raise ValueError(f"{path}:{error}") from None
    except RecursionError:
        raise ValueError(
            f"{path}: config must be valid YAML, got lists nested too deeply; write a mapping of "
            "settings"
        ) from None
    except Exception as error:  # constructors of dates and numbers raise what Python's raise
        if isinstance(error, ValueError) and str(error).startswith(f"{path}:"):
            raise
        raise ValueError(
            f"{path}: config must be valid YAML, got a value that cannot be read "
            f"({_flat(error)}); correct it"
        ) from None


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Counts the values of a document with every alias written out; one in itself has no end."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # while it is being counted: an alias to itself
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        known[id(node)] = 1 + sum(_count_nodes(one, known) for one in below)
    return known[id(node)]


def write_yaml(path: str | Path, values: Mapping[str, Any], comment: str) -> None:
    """Writes values, in their order, under a comment.

    Raises:
        ValueError: the file cannot be written.
    """
    path = os.path.expanduser(path)
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    body = yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=100)
    try:
        Path(path).write_text(f"{head}\n{body}", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path}: must be a file that can be written, got {error.strerror}; check the path "
            "and its disk"
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
