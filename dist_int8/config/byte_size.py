"""Byte sizes as people write them: "79GiB", "80GB", 4096."""

import re

BYTE_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_BYTE_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_byte_size(size: object) -> int:
    """Reads 1073741824, "1GiB", "79.5GiB" or "80GB" as bytes (GiB = 1024**3, GB = 1000**3).

    Raises:
        ValueError: `size` is no byte size above 0; the message has no place and no name in front.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if isinstance(size, str) and (match := _BYTE_SIZE.fullmatch(size)):
        number, unit = match.groups()
        if unit in BYTE_UNITS and (num_bytes := int(float(number) * BYTE_UNITS[unit])) > 0:
            return num_bytes
    raise ValueError(f'must be a byte size above 0, got {size!r}; write it like "79GiB" or "80GB"')


def parse_optional_size(size: object) -> object:
    """Reads a byte size that may also be 0 or None."""
    return size if size is None else 0 if size in (0, "0") else parse_byte_size(size)
