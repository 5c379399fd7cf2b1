"""Turns prompts of every kind into checked token ids and requests."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_int8.api.chat import encode_rendered, render_chat
from dist_int8.api.prompt_list import (
    Encoding,
    Ids,
    Prompt,
    Prompts,
    is_chat,
    list_encoding,
    list_prompt,
    list_prompts,
    to_lists,
)
from dist_int8.config import GenerationSettings
from dist_int8.engine import Request
from dist_int8.engine.rules import make_rules
from dist_int8.engine.text import TextStream
from dist_int8.models.tokenizer import read_tokenizer


@dataclass(frozen=True)
class ModelDefaults:
    """Settings that a model brings along in its generation_config.json.

    Attributes:
        values: fields of `GenerationSettings`.
        refusal: why they must not be used, else "".
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""


class PromptEncoder:
    """Turns prompts into token ids that the model can run. It needs no weights.

    Args:
        folder: folder of the checkpoint, with the tokenizer's files.
        vocab_size: token ids are below it.
        max_tokens: context of a sequence in tokens, prompt and answer together.
        eos_token_ids: tokens that end an answer.
        defaults: settings of generation_config.json.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        max_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
        defaults: ModelDefaults | None = None,
    ) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.eos_token_ids = frozenset(i for i in eos_token_ids if 0 <= i < vocab_size)
        self.defaults = defaults or ModelDefaults()

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model, or None if its folder has none."""
        return read_tokenizer(self.folder, self.vocab_size)

    def check_tokenizer(self) -> None:
        """Reads the tokenizer, so that a damaged one is refused now.

        Raises:
            ValueError: it is damaged, or not of this model.
        """
        _ = self.tokenizer

    def choose(self, generation_config: Any, overrides: Mapping[str, Any]) -> GenerationSettings:
        """Settings of a call: `overrides`, then generation_config, then the model's defaults.

        Raises:
            ValueError: a field that cannot be honoured, by name, or a wrong value.
        """
        defaults = self._find_defaults(overrides.get("model_defaults") is not False)
        return GenerationSettings.from_generation_config(generation_config, overrides, defaults)

    def complete(self, settings: GenerationSettings) -> GenerationSettings:
        """Settings of one request, with the model's defaults where nothing was given.

        Raises:
            ValueError: a default that cannot be honoured, by name.
        """
        if not isinstance(settings, GenerationSettings):
            raise ValueError(
                "request: settings must be GenerationSettings, got "
                f"{type(settings).__name__}; import it from dist_int8.config"
            )
        return settings.over(self._find_defaults(settings.model_defaults))

    def _find_defaults(self, wanted: bool) -> Mapping[str, Any]:
        if not wanted:
            return {}
        if self.defaults.refusal:
            raise ValueError(self.defaults.refusal)
        return self.defaults.values

    def describe_defaults(self, settings: GenerationSettings) -> str:
        """Says in a line which settings come from the model; "" where none does."""
        values = self._find_defaults(settings.model_defaults)
        shown = [
            f"{name}={value!r}"
            for name, value in values.items()
            if name not in settings.model_fields_set
        ]
        return f"from the model's generation_config.json: {', '.join(shown)}" if shown else ""

    def make_requests(self, prompts: Prompts, settings: GenerationSettings) -> list[Request]:
        """Makes one request per prompt; prompt i samples with seed + i.

        Args:
            prompts: one or many: text, token ids, what a tokenizer returns, or chats.
            settings: the same for all of them.

        Raises:
            ValueError: what is not a prompt, or one that cannot be run.
        """
        if settings.seed is None:  # drawn once: prompts that are the same get different answers
            settings = settings.model_copy(update={"seed": _draw_seed()})
        return [
            self._make_request(item, settings, index)
            for index, item in enumerate(list_prompts(prompts))
        ]

    def make_request(self, prompt: Prompt, settings: GenerationSettings, index: int = 0) -> Request:
        """Makes a request of one prompt, with settings of its own.

        Args:
            prompt: text, token ids, what a tokenizer returns for one prompt, or a chat.
            settings: how its tokens are chosen and when it ends.
            index: tells its tokens apart from those of other prompts; it samples with seed + index.

        Raises:
            ValueError: an empty prompt, one longer than the context, or invalid token ids.
        """
        return self._make_request(list_prompt(prompt, index), settings, index)

    def _make_request(self, prompt: Any, settings: GenerationSettings, index: int) -> Request:
        text = prompt if isinstance(prompt, str) else None
        if text is not None:
            prompt_ids = self._tokenize(text, index)
        elif is_chat(prompt):
            text = render_chat(self.tokenizer, prompt, index, self.folder)
            self._check_text(text, index)
            prompt_ids = encode_rendered(self.tokenizer, text)
        else:
            prompt_ids = prompt
        self._check_token_ids("generate", prompt_ids, index, num_new=1)
        self._check_settings(settings, prompt_ids, index)
        seed = settings.seed if settings.seed is not None else _draw_seed()
        return Request(
            index,
            prompt_ids,
            settings,
            (seed + index) % 2**63,
            TextStream(self.tokenizer, settings.stop),
            prompt=text,
            rules=make_rules(settings, len(prompt_ids), self.eos_token_ids, self.max_tokens),
        )

    def show(self, request: Request) -> str:
        """The prompt of a request as text: as it was given, or decoded; "" without a tokenizer."""
        if request.prompt is not None:
            return request.prompt
        return self.tokenizer.decode(request.prompt_ids) if self.tokenizer else ""

    def check_rows(self, input_ids: Ids | Sequence[Ids] | Encoding) -> Tensor:
        """Checks token ids [batch, tokens] whose logits are asked for.

        Raises:
            ValueError: not two-dimensional, empty, or not integers.
        """
        if isinstance(input_ids, Mapping):  # as a tokenizer returns it
            input_ids = list_encoding(input_ids, "logits: input_ids")
        try:
            rows = torch.as_tensor(to_lists(input_ids))
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

    def check_sequences(self, sequences: Sequence[Ids] | Encoding) -> list[list[int]]:
        """Checks token ids of any lengths whose logits are asked for, and makes lists of them.

        Raises:
            ValueError: a sequence is empty, longer than the context, or has an invalid token id.
        """
        if isinstance(sequences, Mapping):
            lists = list_encoding(sequences, "logits: sequences")
        else:
            lists = to_lists(sequences)
        if not isinstance(lists, list) or not all(isinstance(row, list) for row in lists):
            raise ValueError(
                "logits: sequences must be lists of token ids, got "
                f"{type(sequences).__name__}; give a list of lists of integers"
            )
        for index, token_ids in enumerate(lists):
            self._check_token_ids("logits", token_ids, index, num_new=0)
        return lists

    def _tokenize(self, text: str, index: int) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(
                f"generate: prompts must be token ids, got text, and {self.folder} has no "
                "tokenizer; give token ids or add its tokenizer files"
            )
        self._check_text(text, index)
        token_ids = list(self.tokenizer(text).input_ids)
        bos = self.tokenizer.bos_token_id
        if bos is not None and token_ids[:2] == [bos, bos]:  # a rendered chat begins with it
            return encode_rendered(self.tokenizer, text)
        return token_ids

    def _check_text(self, text: str, index: int) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"generate: prompt {index} must be valid text, got bytes that are not "
                "UTF-8; convert it to UTF-8"
            ) from None

    def _check_settings(
        self, settings: GenerationSettings, prompt_ids: list[int], index: int
    ) -> None:
        """Checks what only a model and a prompt can tell of the settings."""
        if settings.stop and self.tokenizer is None:
            raise ValueError(
                f"generate: stop must be left out where there is no tokenizer, got "
                f"{settings.stop!r}, and {self.folder} has none; give stop_token_ids or add its "
                "tokenizer files"
            )
        if settings.count_new_tokens(len(prompt_ids)) < 1:
            length = _count(len(prompt_ids))
            raise ValueError(
                f"generate: max_length must be above the {length} of prompt {index}, "
                f"got {settings.max_length}; raise it or give max_new_tokens"
            )
        lists = {
            "stop_token_ids": settings.stop_token_ids,
            "eos_token_id": settings.eos_token_id or [],
            "suppress_tokens": settings.suppress_tokens,
            "begin_suppress_tokens": settings.begin_suppress_tokens,
            "bad_words_ids": [i for word in settings.bad_words_ids for i in word],
            "sequence_bias": [i for ids, _ in settings.sequence_bias for i in ids],
            "forced_bos_token_id": [settings.forced_bos_token_id or 0],
            "forced_eos_token_id": settings.forced_eos_token_id,
        }
        for name, token_ids in lists.items():
            if token_ids and max(token_ids) >= self.vocab_size:
                raise ValueError(
                    f"generate: {name} must be token ids below {self.vocab_size}, got "
                    f"{max(token_ids)}; use this model's tokenizer"
                )

    def _check_token_ids(self, call: str, token_ids: list[Any], index: int, num_new: int) -> None:
        """Raises ValueError unless the ids are valid and leave room for num_new tokens."""
        limit = self.max_tokens
        if not token_ids:
            raise ValueError(
                f"{call}: prompt {index} must have at least one token, got none; give it text"
            )
        if len(token_ids) + num_new > limit:
            raise ValueError(
                f"{call}: prompt {index} must be at most {_count(limit - num_new)} long (the "
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


def _count(num_tokens: int) -> str:
    return "1 token" if num_tokens == 1 else f"{num_tokens} tokens"
