"""Reads prompts from stdin, where a command is told to by `-`."""

import sys


def read_stdin(where: str, flag: str) -> bytes:
    """Reads all of stdin.

    Args:
        where: how an error begins.
        flag: the flag whose value is `-`.

    Raises:
        ValueError: stdin is a terminal, closed or empty.
    """
    reason = ""
    content = b""
    if sys.stdin is None or sys.stdin.closed:
        reason = "a closed stdin"
    elif sys.stdin.isatty():
        reason = "a terminal"
    else:
        content = sys.stdin.buffer.read()
        if not content.strip():
            reason = "nothing"
    if reason:
        raise ValueError(
            f"{where}: {flag} - must have something to read on stdin, got {reason}; pipe it in, as "
            f"in: cat FILE | dist-int8 generate {flag} -"
        )
    return content


def read_text(where: str, flag: str) -> str:
    """Reads all of stdin as UTF-8 text, without the line end that closes it.

    Raises:
        ValueError: stdin is a terminal, closed, empty, or not UTF-8.
    """
    try:
        text = read_stdin(where, flag).decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: {flag} - must read UTF-8, got a byte of another encoding at position "
            f"{error.start + 1}; convert it"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")
