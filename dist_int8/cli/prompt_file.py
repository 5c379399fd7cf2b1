"""Reads prompts from a file of JSON lines and writes answers to another, through kills.

A line of the input is an object with one of `prompt`, `token_ids` or `messages` (for the chat
template), optionally an `id`, and fields of `GenerationSettings` for this line alone. A line of the
output has the same id and either `text`, `token_ids` and `finish_reason`, or `error`. Its `request`
is a fingerprint of everything that decides the answer: by it a later run knows what is done, and
refuses an output that was made from something else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from dist_int8.cli.targets import named
from dist_int8.config import GenerationSettings

KINDS = ("prompt", "token_ids", "messages")


@dataclass(frozen=True)
class Item:
    """One line of the input.

    Attributes:
        index: position among the lines that are not empty.
        id: the `id` of the line, or its number.
        kind: "prompt", "token_ids" or "messages".
        content: value of the key that `kind` names.
        settings: settings of this answer.
        fingerprint: hash of everything that decides the answer.
        error: why the line cannot be answered; then kind, content and settings mean nothing.
        place: file and line, for errors that show later.
    """

    index: int
    id: str | int
    kind: str
    content: Any
    settings: GenerationSettings
    fingerprint: str
    error: str | None = None
    place: str = ""


def read_items(
    path: Path,
    settings: Mapping[str, Any],
    same: Mapping[str, Any],
    content: bytes | None = None,
) -> list[Item]:
    """Reads the lines of `path`; a malformed one becomes an item with an error.

    Args:
        path: JSON lines in UTF-8. Empty lines are skipped.
        settings: values of `GenerationSettings` that a line may override.
        same: what else decides an answer (the model, its numerics), for the fingerprints.
        content: what the lines are, if they are not read from `path`.

    Raises:
        ValueError: no such file, no lines in it, or the same id twice.
    """
    try:
        content = path.read_bytes() if content is None else content
    except OSError as error:
        raise ValueError(
            f"{path}: input must be a file of JSON lines, got {error.strerror}; check the path"
        ) from None
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    items: list[Item] = []
    seen: dict[str | int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        item = _read_item(line, number, len(items), f"{path}:{number}", settings, same)
        if item.id in seen:
            raise ValueError(
                f"{path}:{number}: id must differ from every other, got {item.id!r} as in line "
                f"{seen[item.id]}; give each line its own"
            )
        seen[item.id] = number
        items.append(item)
    if not items:
        raise ValueError(
            f'{path}: input must have at least one line, got none; write {{"prompt": "..."}}'
        )
    return items


def _read_item(
    line: bytes,
    number: int,
    index: int,
    place: str,
    settings: Mapping[str, Any],
    same: Mapping[str, Any],
) -> Item:
    chosen = GenerationSettings.from_values(settings, place)
    name: str | int = number
    known = GenerationSettings.model_fields
    try:
        given = _parse_line(line, place)
        name = _read_id(given, number, place)
        kind = _find_kind(given, place)
        fields = {
            key: value
            for key, value in given.items()
            if key not in ("id", kind) and (value is not None or key not in known)
        }  # null is the value of the command line, as if the key were left out
        chosen = GenerationSettings.from_values({**settings, **fields}, place)
    except ValueError as error:
        return Item(index, name, "", None, chosen, _hash(line.decode("latin-1")), str(error))
    decides = [kind, given[kind], chosen.model_dump(mode="json"), index, dict(same)]
    return Item(index, name, kind, given[kind], chosen, _hash(decides), place=place)


def _parse_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        given = json.loads(line.decode(), object_pairs_hook=_refuse_doubled)
    except KeyError as error:
        key = error.args[0]
        raise ValueError(
            f"{place}: {key} must be given once, got it more than once; keep one"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place}: line must be JSON in UTF-8, got {_word_syntax(error)}; write one object per "
            "line"
        ) from None
    if not isinstance(given, dict):
        raise ValueError(
            f"{place}: line must be an object, got {type(given).__name__}; "
            'write {"prompt": "..."}'
        )
    return given


def _refuse_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object; a KeyError names a key that it has twice, of which the last would win."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise KeyError(key)
        made[key] = value
    return made


def _word_syntax(error: Exception) -> str:
    """Says in words of ours why a line is no JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"a mistake at character {error.pos + 1} ({error.msg})"
    if isinstance(error, UnicodeDecodeError):
        return f"a byte of another encoding at position {error.start + 1}"
    return "lists nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_id(given: dict[str, Any], number: int, place: str) -> str | int:
    name = given.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(
            f"{place}:id: id must be text or an integer, got {name!r}; leave it out for the number "
            "of the line"
        )
    _check_text(str(name), f"{place}:id: id")
    return name


def _find_kind(given: dict[str, Any], place: str) -> str:
    """Finds which of the three the line has and checks the type of its value."""
    found = [kind for kind in KINDS if kind in given]
    if len(found) != 1:
        raise ValueError(
            f"{place}: line must have one of {', '.join(KINDS)}, got "
            f"{' and '.join(found) or 'none'}; keep one"
        )
    kind, content = found[0], given[found[0]]
    if kind == "prompt" and not isinstance(content, str):
        expected = "text"
    elif kind == "token_ids" and not (
        isinstance(content, list) and all(type(token) is int for token in content)
    ):
        expected = "a list of integers"
    elif kind == "messages" and not (
        isinstance(content, list) and content and all(isinstance(m, dict) for m in content)
    ):
        expected = "a list of objects with role and content"
    else:
        return kind
    raise ValueError(
        f"{place}:{kind}: {kind} must be {expected}, got {type(content).__name__}; see --help"
    )


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{what} must be valid text, got half a character; write it in UTF-8"
        ) from None


def _hash(values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Answers:
    """The output file, with one line per item, appended and flushed when it is done.

    Lines that are there already count as done, except errors, which are tried again. A torn last
    line, from a run that was killed, is dropped.

    Args:
        path: the file; it is created if missing.
        items: items of the input.

    Raises:
        ValueError: the file holds something other than answers to these items, or another run
            writes to it.
    """

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("a+b")
        except OSError as error:
            raise ValueError(
                f"{path}: output must be a file that can be written, got {error.strerror}; "
                "check the path"
            ) from None
        self._lock(self._file)
        self._file.seek(0)
        content = self._file.read()
        kept, self.done = self._read(content, {item.id: item for item in items})
        if kept != content:
            self._replace(kept)

    def add(self, item: Item, **values: Any) -> None:
        """Appends the line of the item, with its answer or `error`."""
        line = _format_line({"id": item.id, **values, "request": item.fingerprint})
        with named(self.path):
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with named(self.path):  # it tries again to write what did not fit
            self._file.close()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self, file: IO[bytes]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ValueError(
                f"{self.path}: output must be written by one run, got a second one; "
                "wait for the other or name another file"
            ) from None

    def _read(self, content: bytes, items: dict[str | int, Item]) -> tuple[bytes, set[str | int]]:
        """Returns the lines to keep, and the ids that they answer."""
        kept, done = [], set()
        *lines, _torn = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                name, fingerprint = values["id"], values["request"]
                failed = "error" in values
                item = items.get(name)
            except (ValueError, KeyError, TypeError, RecursionError):
                self._refuse(number, "something else")
            if failed:
                continue
            if item is None:
                self._refuse(number, f"id {name!r}, which is not in the input")
            if fingerprint != item.fingerprint:
                self._refuse(number, f"another prompt or other settings of id {name!r}")
            kept.append(line + b"\n")
            done.add(name)
        return b"".join(kept), done

    def _refuse(self, number: int, got: str) -> NoReturn:
        self._file.close()
        raise ValueError(
            f"{self.path}:{number}: output must hold answers to this input with these settings, "
            f"got {got}; name another file"
        )

    def _replace(self, content: bytes) -> None:
        """Writes a copy and renames it, so that a kill leaves the old file or the new one."""
        copy = self.path.with_name(self.path.name + ".tmp")
        with named(copy):
            file = copy.open("wb")
            self._lock(file)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(copy, self.path)
        self._file.close()
        self._file = file


def _format_line(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False) + "\n").encode(errors="replace")
