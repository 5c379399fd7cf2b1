r"""Characters that are hard to type on a command line: `--stop '\n'` means a newline."""

import re

_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[ntr\\uU])")


def read_escapes(text: str, where: str) -> str:
    r"""Reads \n, \t, \r, \\, \uXXXX and \UXXXXXXXX; a backslash before anything else is itself.

    Args:
        text: as given in the shell.
        where: how an error begins, as in "dist-int8 generate: --stop".

    Raises:
        ValueError: a \u without its four digits, or one that is no character.
    """

    def read(match: re.Match[str]) -> str:
        escape = match[1]
        if escape in _SIMPLE:
            return _SIMPLE[escape]
        try:
            return chr(int(escape[1:], 16))
        except ValueError:  # no digits, or beyond the last character
            raise _refuse(text, where) from None

    found = _ESCAPE.sub(read, text)
    try:  # two halves of a character, as JSON writes those beyond U+FFFF
        return found.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _refuse(text, where) from None


def _refuse(text: str, where: str) -> ValueError:
    return ValueError(
        f"{where} must be text in which \\uXXXX names a character, got {text!a}; "
        r"write \\u for a backslash before a u"
    )
