"""A command that drops nothing of its command line: doubled, empty and wrong values have names.

By itself a parser of flags lets the last of two values win, takes "" for the working directory,
and does not show the number that it cannot read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand

MAY_BE_EMPTY = ("prompt", "system")  # text that is itself the question
_EXPECTED = {"integer": "an integer", "number": "a number", "boolean": "true or false"}


class Command(TyperCommand):
    """A command of `dist-int8`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses `args`.

        Raises:
            ValueError: a flag of one value is given twice, is empty, or is no such number.
        """
        values, order = self._scan(ctx, args)
        if not any(param.is_eager for param in order):  # --help helps, whatever stands beside it
            where = ctx.command_path
            for problem in (*_find_doubled(order), *_find_empty(order, values)):
                raise ValueError(f"{where}: {problem}")
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            param = getattr(error, "param", None)
            value = values.get(param.name) if param is not None else None
            if not hasattr(error, "format_message") or not isinstance(value, str):
                raise
            raise ValueError(f"{ctx.command_path}: {_reword(error, param, value)}") from None

    def _scan(self, ctx: Any, args: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """Splits `args` without converting anything: text by name, and the parameters in order."""
        parser: Any = self.make_parser(ctx)
        try:
            values, _, order = parser.parse_args(args=list(args))
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:  # so that the error names this command
                error.ctx = ctx  # type: ignore[attr-defined]
            raise
        return values, order


def spell(param: Any) -> str:
    """Returns the spelling of an option as people know it, or the name of an argument."""
    if not param.opts[0].startswith("-"):
        return str(param.metavar or param.name.upper())
    return str(max(param.opts, key=len))


def _find_doubled(order: list[Any]) -> Iterator[str]:
    """Yields what is wrong with options that are given twice but hold one value."""
    for param in dict.fromkeys(order):
        repeats = getattr(param, "multiple", False) or getattr(param, "count", False)
        switch = getattr(param, "is_flag", False) and not param.secondary_opts
        if order.count(param) > 1 and not (repeats or switch):
            both = "/".join((spell(param), *param.secondary_opts))
            yield f"{both} must be given once, got it {order.count(param)} times; keep one"


def _find_empty(order: list[Any], values: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with options whose value is an empty string."""
    for param in dict.fromkeys(order):
        given = values.get(param.name)
        if "" in (given if isinstance(given, list | tuple) else [given]):
            if param.name in MAY_BE_EMPTY:
                continue
            optional = "leave it out or " if param.opts[0].startswith("-") else ""
            yield f"{spell(param)} must be non-empty, got ''; {optional}give a value"


def _reword(error: Any, param: Any, value: str) -> str:
    """Words a wrong number as every other wrong value, the value included."""
    said = str(getattr(error, "message", error))
    for kind, expected in _EXPECTED.items():
        if f"valid {kind}" in said:
            example = f"; write it like {spell(param)} 1" if kind != "boolean" else ""
            return f"{spell(param)} must be {expected}, got {value!r}{example}"
    for begin, expected in (("greater than or equal to", "at least"), ("less than", "at most")):
        if begin in said:
            limit = said.rstrip(".").split()[-1]
            return f"{spell(param)} must be {expected} {limit}, got {value}; correct it"
    return f"{spell(param)} is wrong: {said.rstrip('.')}, got {value!r}; correct it"
