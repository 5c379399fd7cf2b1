"""Chats as text: messages in the chat template of the model's tokenizer, which runs sandboxed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")


def render_chat(tokenizer: Any, messages: Sequence[Any], index: int, folder: Path) -> str:
    """Renders messages as the text of a prompt whose continuation is the assistant's answer.

    Args:
        tokenizer: transformers' tokenizer, or None.
        messages: dicts with a role and a content, which is text or a list of parts of text.
        index: number of the prompt, for errors.
        folder: of the model, for errors.

    Raises:
        ValueError: there is no template, or the messages do not fit it.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            f"generate: model must have a chat template for the messages of prompt {index}, got "
            f"none in {folder}; write the prompt as text"
        )
    checked = [_check_message(message, index, place) for place, message in enumerate(messages)]
    try:
        text = tokenizer.apply_chat_template(checked, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        is_text = isinstance(tokenizer.chat_template, str | dict)
        if not is_text or type(error).__name__ == "TemplateSyntaxError":  # whatever the messages
            raise ValueError(
                f"generate: the chat template in {folder} must be a template of Jinja, got "
                f"{reason}; download the tokenizer's files again, or write the prompt as text"
            ) from None
        raise ValueError(
            f"generate: messages of prompt {index} must fit the chat template, got {reason}; "
            'write them like {"role": "user", "content": "Hi"}'
        ) from None
    return str(text)


def encode_rendered(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that has its special tokens already."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _check_message(message: Any, index: int, place: int) -> dict[str, Any]:
    """Checks a message; parts of text become one text, as templates of language models expect."""
    where = f"generate: message {place} of prompt {index}"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        got = f"{message.get('role')!r}" if isinstance(message, Mapping) else type(message).__name__
        raise ValueError(
            f"{where} must be a dict with a role and a content, got {got} in place of a role; "
            'write it like {"role": "user", "content": "Hi"}'
        )
    if message["role"] not in _ROLES:
        _log.warning("%s: role is usually one of %s, got %r", where, _ROLES, message["role"])
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "\n".join(_read_part(part, where) for part in content)}
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(
            f"{where}: content must be text, got {type(content).__name__}; write it like "
            '{"role": "user", "content": "Hi"}'
        )
    return dict(message)


def _read_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f"{where}: parts of content must be of type text, got {kind}; leave it out"
        )
    return str(part["text"])
