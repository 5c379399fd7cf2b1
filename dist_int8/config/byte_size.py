"""Byte sizes as people write them: "79GiB", "80GB", 4096."""

import re
from decimal import Decimal

from dist_int8.config.checked import show

BYTE_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_BYTE_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*")
SMALLEST_BARE = 2**20  # below it, a number without a unit was meant in GB
LARGEST = 2**60


def parse_byte_size(size: object) -> int:
    """Reads 1073741824, "1GiB", "79.5GiB" or "80GB" as bytes (GiB = 1024**3, GB = 1000**3).

    Raises:
        ValueError: `size` is no byte size above 0, or a small number without a unit; the message
            has no place and no name in front.
    """
    number, unit = _split(size)
    if number is None or unit not in BYTE_UNITS:
        raise ValueError(
            f'must be a byte size above 0, got {show(size)}; write it like "79GiB" or "80GB"'
        )
    if not unit and number < SMALLEST_BARE:
        raise ValueError(
            f"must be a byte size with its unit, got {show(size)}, which is {size} bytes; write "
            f'"{size}GiB" or "{size}GB", or "{size}B" for bytes'
        )
    num_bytes = int(number * BYTE_UNITS[unit])
    if not 1 <= num_bytes <= LARGEST:
        raise ValueError(
            f'must be a byte size from 1B to 2^60 bytes, got {show(size)}; write it like "79GiB"'
        )
    return num_bytes


def _split(size: object) -> tuple[Decimal | None, str]:
    """Splits a size into number and unit; (None, "") if it is none above 0."""
    if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST:
        return Decimal(size), ""
    if isinstance(size, str) and (match := _BYTE_SIZE.fullmatch(size)):
        number = Decimal(match[1])
        return (number, match[2]) if number > 0 else (None, "")
    return None, ""


def parse_optional_size(size: object) -> object:
    """Reads a byte size that may also be 0 or None."""
    is_zero = size in (0, "0") and not isinstance(size, bool)
    return size if size is None else 0 if is_zero else parse_byte_size(size)
