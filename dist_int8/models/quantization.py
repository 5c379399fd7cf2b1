"""The quantization_config of a config.json: which forms are read."""

from typing import Any

# The `version` in the quantization_config of our int8 checkpoints.
INT8_VERSION = 1


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
        return written.get("version") == INT8_VERSION
    return method == "bitsandbytes" and written.get("load_in_8bit") is True


def _name(written: Any) -> str:
    """Names a form in a few words."""
    if not isinstance(written, dict):
        return repr(written)
    method = written.get("quant_method")
    if method == "dist_int8":
        return f"dist_int8 in version {written.get('version')!r}, this program knows {INT8_VERSION}"
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
    for key in ("num_hot_columns", "head_hot_columns"):
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
