"""Lists the prompts in whatever a caller has: texts, token ids, arrays, encodings, chats.

A prompt comes out as text (str), a chat (list of messages), or token ids (list), which are not
checked yet. What is none of these is refused by its type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Message = Mapping[str, Any]
Chat = Sequence[Message]
Ids = Sequence[int] | np.ndarray[Any, Any] | Tensor
Encoding = Mapping[str, Any]  # as a tokenizer returns it, with input_ids
Prompt = str | Ids | Chat | Encoding
Prompts = Prompt | Sequence[Prompt]

# What a tokenizer returns beside input_ids and attention_mask. It describes the tokens, and a
# decoder does not read it.
_DESCRIPTIONS = {
    "token_type_ids",
    "special_tokens_mask",
    "offset_mapping",
    "length",
    "overflowing_tokens",
    "num_truncated_tokens",
    "overflow_to_sample_mapping",
    "assistant_masks",
}


def list_prompts(prompts: Any) -> list[Any]:
    """Lists prompts; a single one, as text, token ids, encoding or chat, gives a list of one.

    Raises:
        ValueError: something that is no prompt, by its type.
    """
    if isinstance(prompts, Mapping):
        return list_encoding(prompts, "generate: prompts")
    items = to_lists(prompts)
    if isinstance(items, str):
        return [items]
    if not isinstance(items, list):
        raise ValueError(
            "generate: prompts must be text, token ids or a list of either, got "
            f"{type(prompts).__name__}; give a string or a list"
        )
    if is_chat(items) or (items and isinstance(items[0], int)):
        return [items]
    return [prompt for index, item in enumerate(items) for prompt in _list_item(item, index)]


def list_encoding(encoding: Encoding, what: str) -> list[Any]:
    """Lists the token ids of what a tokenizer returned, without those that attention_mask masks.

    Args:
        encoding: a BatchEncoding or dict of one prompt or several.
        what: how errors begin.

    Raises:
        ValueError: no input_ids, a key that would change the answer, or a mask of another shape.
    """
    keys = {str(key) for key in encoding}
    if "input_ids" not in keys:
        hint = "put messages into a list" if "role" in keys else "give what a tokenizer returns"
        raise ValueError(
            f"{what} must be text, token ids or a dict with input_ids, got a dict with "
            f"{', '.join(sorted(keys)) or 'no keys'}; {hint}"
        )
    if unknown := sorted(keys - _DESCRIPTIONS - {"input_ids", "attention_mask"}):
        raise ValueError(
            f"{what} must have input_ids and attention_mask alone, got "
            f"{', '.join(unknown)}; leave it out"
        )
    rows = list_rows(encoding["input_ids"], f"{what}: input_ids")
    if encoding.get("attention_mask") is None:
        return rows
    mask = list_rows(encoding["attention_mask"], f"{what}: attention_mask")
    if [len(row) for row in rows] != [len(row) for row in mask] or any(
        kept not in (0, 1) for row in mask for kept in row
    ):
        raise ValueError(
            f"{what}: attention_mask must be 0 or 1 for every one of input_ids, got "
            "another shape or other values; leave it out if nothing is padded"
        )
    return [
        [token_id for token_id, kept in zip(row, keeps, strict=True) if kept]
        for row, keeps in zip(rows, mask, strict=True)
    ]


def is_chat(value: object) -> bool:
    """Whether this is a list of messages: of dicts that no tokenizer returned."""
    return (
        isinstance(value, list)
        and any(isinstance(item, Mapping) and "role" in item for item in value)
        and isinstance(value[0], Mapping)
    )


def list_prompt(prompt: Any, index: int) -> Any:
    """The one prompt in what a caller has for it, as `list_prompts` lists it.

    Raises:
        ValueError: something that is no prompt, or several.
    """
    found = _list_item(to_lists(prompt), index)
    if len(found) != 1:
        raise ValueError(
            f"generate: prompt {index} must be one prompt, got {len(found)}; give them one by one"
        )
    return found[0]


def _list_item(item: Any, index: int) -> list[Any]:
    """Lists the prompts of one item of a list: an encoding or an array may hold several rows."""
    if isinstance(item, str) or is_chat(item):
        return [item]
    if isinstance(item, Mapping):
        return list_encoding(item, f"generate: prompt {index}")
    if isinstance(item, list):
        return list_rows(item, f"generate: prompt {index}") if item else [item]
    raise ValueError(
        f"generate: prompt {index} must be text or token ids, got {_show(item)}; give strings, or "
        "lists of integers"
    )


def list_rows(ids: Any, what: str) -> list[list[Any]]:
    """Lists the rows of token ids in one row or several, of lists, arrays or tensors.

    Args:
        ids: token ids, which are not checked.
        what: how errors begin.

    Raises:
        ValueError: neither a row nor rows.
    """
    rows = to_lists(ids)
    if isinstance(rows, list):
        are_rows = [isinstance(item, list) for item in rows]
        if all(are_rows):
            return rows
        if not any(are_rows):
            return [rows]
    raise ValueError(
        f"{what} must be token ids, or rows of them, got {_show(ids)}; give lists of integers"
    )


def to_lists(value: Any) -> Any:
    """Python's lists and integers, in place of sequences, arrays and tensors; others stay."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Tensor | np.ndarray):
        return to_lists(value.tolist()) if str(value.dtype) == "object" else value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [to_lists(item) for item in value]
    return value


def _show(value: object) -> str:
    return repr(value) if isinstance(value, int | float) else type(value).__name__
