"""The quantization_config of a config.json: which forms are read."""

from typing import Any

from dist_int8.int8.rotation import LARGEST_ROTATION, check_rotation

# The `version` in the quantization_config of our int8 checkpoints. Releases that know only the
# first refuse rotated weights, which they would run wrong.
INT8_VERSION, ROTATED_VERSION = 1, 2


def check_quantization(where: str, written: Any) -> None:
    """Refuses weights in a form that is not read: ours and bitsandbytes' 8 bits are.

    Args:
        where: the file, for messages.
        written: its quantization_config; None: the weights are not quantized.

    Raises:
        ValueError: any other form; it is named.
    """
    if written is None:
        return
    if _is_readable_int8(written):
        if written.get("quant_method") == "dist_int8":
            _check_ours(where, written)
        return
    raise ValueError(
        f"{where}:quantization_config: must be absent, or of dist_int8 or bitsandbytes' 8 bits, "
        f"got {_name(written)}; give the original model with weights of 16 bits (config.json and "
        "safetensors without quantization), int8 is made while it loads"
    )


def _is_readable_int8(written: Any) -> bool:
    if not isinstance(written, dict):
        return False
    method = written.get("quant_method", "bitsandbytes")
    if method == "dist_int8":
        return written.get("version") in (INT8_VERSION, ROTATED_VERSION)
    return method == "bitsandbytes" and written.get("load_in_8bit") is True


def _name(written: Any) -> str:
    """Names a form in a few words."""
    if not isinstance(written, dict):
        return repr(written)
    method = written.get("quant_method")
    if method == "dist_int8":
        known = f"{INT8_VERSION} and {ROTATED_VERSION}"
        return f"dist_int8 in version {written.get('version')!r}, this program knows {known}"
    if method in (None, "bitsandbytes") and written.get("load_in_4bit") is True:
        return f"bitsandbytes in 4 bits ({written.get('bnb_4bit_quant_type', 'fp4')})"
    bits = written.get("bits", written.get("w_bit"))
    shown = f" in {bits} bits" if isinstance(bits, int) else ""
    return f"{method!r}{shown}" if method is not None else "a form without a quant_method"


def _check_ours(where: str, written: dict[str, Any]) -> None:
    """Checks the fields of our own form, which are read as they are."""
    skip = written.get("skip_modules")
    if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
        raise ValueError(
            f"{where}:quantization_config.skip_modules: must be a list of names, got {skip!r}; "
            "write the checkpoint again"
        )
    for key in ("num_hot_columns", "down_hot_columns", "head_hot_columns"):
        count = written.get(key, 0)
        if type(count) is not int or count < 0:
            raise ValueError(
                f"{where}:quantization_config.{key}: must be an integer of at least 0, got "
                f"{count!r}; write the checkpoint again"
            )
    if written.get("embedding", "int8") not in ("int8", "16bit"):
        raise ValueError(
            f"{where}:quantization_config.embedding: must be int8 or 16bit, got "
            f"{written['embedding']!r}; write the checkpoint again"
        )
    accuracy = written.get("accuracy")
    if accuracy is not None and not isinstance(accuracy, str):
        raise ValueError(
            f"{where}:quantization_config.accuracy: must be a name, got {accuracy!r}; write the "
            "checkpoint again"
        )
    _check_rotation(where, written)


def _check_rotation(where: str, written: dict[str, Any]) -> None:
    rotation = written.get("rotation", 0)
    try:
        if type(rotation) is int:
            check_rotation(rotation)
        is_size = type(rotation) is int
    except ValueError:
        is_size = False
    wanted = ROTATED_VERSION if rotation else INT8_VERSION
    if not is_size or written["version"] != wanted:
        raise ValueError(
            f"{where}:quantization_config.rotation: must be a power of two from 2 to "
            f"{LARGEST_ROTATION} in version {ROTATED_VERSION}, and 0 or absent in version "
            f"{INT8_VERSION}, got {rotation!r} in version {written['version']}; write the "
            "checkpoint again"
        )
