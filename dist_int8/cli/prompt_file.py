"""Prompts from a file of JSON lines, answers into another that may be killed at any time.

A line of the input is an object with one of `prompt`, `token_ids` or `messages` (for the chat
template), perhaps an `id`, and fields of `GenerationSettings` that hold for it alone. A line of the
output has the same id and either `text`, `token_ids` and `finish_reason`, or `error`. Its `request`
is a fingerprint of all that decides the answer: by it a later run knows what is done already, and
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

from dist_int8.config import GenerationSettings

KINDS = ("prompt", "token_ids", "messages")


@dataclass(frozen=True)
class Item:
    """One line of the input.

    Attributes:
        index: its place among the lines that are not empty.
        id: its `id`, or the number of its line.
        kind: "prompt", "token_ids" or "messages".
        content: what stands there.
        settings: of this answer.
        fingerprint: of everything that decides the answer.
        error: why it cannot be answered; kind, content and settings mean nothing then.
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


def read_items(path: Path, settings: Mapping[str, Any], same: Mapping[str, Any]) -> list[Item]:
    """The lines of `path`; one that makes no sense has an error and stops no other.

    Args:
        path: JSON lines, UTF-8. Empty lines are passed over.
        settings: values of `GenerationSettings` where a line says nothing else.
        same: what else decides an answer (the model, its numerics), for the fingerprints.

    Raises:
        ValueError: no such file, nothing in it, or the same id twice.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(
            f"{path}: input must be a file of JSON lines, got {error.strerror}; check the path"
        ) from None
    items: list[Item] = []
    seen: dict[str | int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        item = _item(line, number, len(items), f"{path}:{number}", settings, same)
        if item.id in seen:
            raise ValueError(
                f"{path}:{number}: id must differ from every other, got {item.id!r} as in line "
                f"{seen[item.id]}; give each line its own"
            )
        seen[item.id] = number
        items.append(item)
    if not items:
        raise ValueError(
            f'{path}: input must have a line at least, got none; write {{"prompt": "..."}}'
        )
    return items


def _item(
    line: bytes,
    number: int,
    index: int,
    place: str,
    settings: Mapping[str, Any],
    same: Mapping[str, Any],
) -> Item:
    chosen = GenerationSettings.from_values(settings, place)
    name: str | int = number
    try:
        given = _parsed(line, place)
        name = _id(given, number, place)
        kind = _kind(given, place)
        fields = {key: value for key, value in given.items() if key not in ("id", kind)}
        chosen = GenerationSettings.from_values({**settings, **fields}, place)
    except ValueError as error:
        return Item(index, name, "", None, chosen, _fingerprint(line.decode("latin-1")), str(error))
    decides = [kind, given[kind], chosen.model_dump(mode="json"), index, dict(same)]
    return Item(index, name, kind, given[kind], chosen, _fingerprint(decides), place=place)


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    try:
        given = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{place}: line must be JSON in UTF-8, got {reason}; write one object a line"
        ) from None
    if not isinstance(given, dict):
        raise ValueError(
            f"{place}: line must be an object, got {type(given).__name__}; "
            'write {"prompt": "..."}'
        )
    return given


def _id(given: dict[str, Any], number: int, place: str) -> str | int:
    name = given.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(
            f"{place}:id: id must be text or an integer, got {name!r}; leave it out for the number "
            "of the line"
        )
    _check_text(str(name), f"{place}:id: id")
    return name


def _kind(given: dict[str, Any], place: str) -> str:
    """Which of the three the line has, its shape checked."""
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


def _fingerprint(values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Answers:
    """The output: a line an item, appended and flushed as it is done.

    What is there already counts as done, unless it is an error, which is tried again. A last line
    without its end, from a run that was killed, is dropped.

    Args:
        path: of the file; it is made if it is not there.
        items: of the input.

    Raises:
        ValueError: the file holds something else than answers to these items, or another run
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
        """Appends the item's line: its answer, or `error`."""
        self._file.write(_line({"id": item.id, **values, "request": item.fingerprint}))
        self._file.flush()

    def close(self) -> None:
        """Lets go of the file."""
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
        """The lines that stay, and the ids that they answer."""
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
                self._refuse(number, f"id {name!r}, which the input has not")
            if fingerprint != item.fingerprint:
                self._refuse(number, f"another prompt or other settings of id {name!r}")
            kept.append(line + b"\n")
            done.add(name)
        return b"".join(kept), done

    def _refuse(self, number: int, got: str) -> NoReturn:
        self._file.close()
        raise ValueError(
            f"{self.path}:{number}: output must hold answers to this input with these settings, "
            f"got {got}; name another file, or remove it to start again"
        )

    def _replace(self, content: bytes) -> None:
        """Writes aside and renames: a kill leaves the old file or the new one."""
        aside = self.path.with_name(self.path.name + ".tmp")
        file = aside.open("wb")
        self._lock(file)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.replace(aside, self.path)
        self._file.close()
        self._file = file


def _line(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False) + "\n").encode(errors="replace")
