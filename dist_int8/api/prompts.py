"""Turns prompts of every kind into checked token ids and requests."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_int8.config import GenerationSettings
from dist_int8.engine import Request
from dist_int8.engine.text import TextStream
from dist_int8.models.tokenizer import read_tokenizer

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


class PromptEncoder:
    """Turns prompts into token ids that the model can run.

    Args:
        folder: folder of the checkpoint, with the tokenizer's files.
        vocab_size: token ids are below it.
        max_tokens: context of a sequence in tokens, prompt and answer together.
    """

    def __init__(self, folder: Path, vocab_size: int, max_tokens: int) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model, or None if its folder has none."""
        return read_tokenizer(self.folder, self.vocab_size)

    def make_requests(self, prompts: Prompts, settings: GenerationSettings) -> list[Request]:
        """Makes one request per prompt; prompt i samples with seed + i.

        Args:
            prompts: a string, a list of strings, token ids, or a list of token ids.
            settings: the same for all of them.

        Raises:
            ValueError: what is not a prompt, or one that cannot be run.
        """
        if settings.seed is None:  # drawn once: prompts that are the same get different answers
            settings = settings.model_copy(update={"seed": _draw_seed()})
        return [
            self.make_request(item, settings, index)
            for index, item in enumerate(_list_prompts(prompts))
        ]

    def make_request(
        self, prompt: str | Sequence[int], settings: GenerationSettings, index: int = 0
    ) -> Request:
        """Makes a request of one prompt, with settings of its own.

        Args:
            prompt: text or token ids.
            settings: how its tokens are chosen and when it ends.
            index: tells its tokens apart from those of other prompts; it samples with seed + index.

        Raises:
            ValueError: an empty prompt, one longer than the context, or invalid token ids.
        """
        seed = settings.seed if settings.seed is not None else _draw_seed()
        prompt_ids = self._encode(prompt, index)
        text = TextStream(self.tokenizer, settings.stop)
        return Request(index, prompt_ids, settings, (seed + index) % 2**63, text)

    def decode(self, token_ids: list[int]) -> str:
        """Decodes a prompt to text; "" without a tokenizer."""
        return self.tokenizer.decode(token_ids) if self.tokenizer else ""

    def check_rows(self, input_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Checks token ids [batch, tokens] whose logits are asked for.

        Raises:
            ValueError: not two-dimensional, empty, or not integers.
        """
        try:
            rows = torch.as_tensor(input_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"logits: input_ids must be integers [batch, tokens], got {error}; give "
                "equally long lists of token ids"
            ) from None
        if rows.ndim != 2 or not rows.numel() or rows.is_floating_point():
            raise ValueError(
                "logits: input_ids must be integers [batch, tokens], got "
                f"{rows.dtype} {list(rows.shape)}; give a list of equally long lists of token ids"
            )
        return rows

    def check_sequences(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Checks token ids of any lengths whose logits are asked for, and makes lists of them.

        Raises:
            ValueError: a sequence is empty, longer than the context, or has an invalid token id.
        """
        lists = [list(sequence) for sequence in sequences]
        for index, token_ids in enumerate(lists):
            self._check_token_ids("logits", token_ids, index, num_new=0)
        return lists

    def _encode(self, prompt: Any, index: int) -> list[int]:
        """Turns a prompt into checked token ids."""
        if isinstance(prompt, str):
            prompt_ids = self._tokenize(prompt, index)
        elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
            prompt_ids = list(prompt)
        else:
            raise ValueError(
                f"generate: prompt {index} must be text or token ids, got {prompt!r}; give "
                "strings, or lists of integers"
            )
        self._check_token_ids("generate", prompt_ids, index, num_new=1)
        return prompt_ids

    def _tokenize(self, text: str, index: int) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(
                f"generate: prompts must be token ids, got text, and {self.folder} has no "
                "tokenizer; give token ids or add its tokenizer files"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"generate: prompt {index} must be valid text, got bytes that are not "
                "UTF-8; convert it to UTF-8"
            ) from None
        return list(self.tokenizer(text).input_ids)

    def _check_token_ids(self, call: str, token_ids: list[Any], index: int, num_new: int) -> None:
        """Raises ValueError unless the ids are valid and leave room for num_new tokens."""
        limit = self.max_tokens
        if not token_ids:
            raise ValueError(
                f"{call}: prompt {index} must have at least one token, got none; give it text"
            )
        if len(token_ids) + num_new > limit:
            raise ValueError(
                f"{call}: prompt {index} must be at most {limit - num_new} tokens long (the "
                f"context is {limit}), got {len(token_ids)}; shorten it or raise max_tokens"
            )
        for token_id in token_ids:
            is_id = isinstance(token_id, int) and not isinstance(token_id, bool)
            if not is_id or not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"{call}: token ids of prompt {index} must be integers 0 to "
                    f"{self.vocab_size - 1}, got {token_id!r}; use this model's tokenizer"
                )


def _draw_seed() -> int:
    return random.SystemRandom().getrandbits(48)


def _list_prompts(prompts: Prompts) -> list[Any]:
    """Lists the prompts; a single one, as text or token ids, gives a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        if isinstance(prompts, bytes | bytearray | Mapping):
            raise TypeError
        items: list[Any] = list(prompts.tolist() if isinstance(prompts, Tensor) else prompts)
    except TypeError:
        raise ValueError(
            f"generate: prompts must be text, token ids or a list of either, got "
            f"{type(prompts).__name__}; give a string or a list"
        ) from None
    return [items] if items and isinstance(items[0], int) else items
