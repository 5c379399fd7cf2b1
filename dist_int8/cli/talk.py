"""How the prompts of a command line become prompts of the model."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Talk:
    """Whether prompts are put into the chat template, and after which system message."""

    chat: bool = False
    system: str | None = None

    def make_prompt(self, text: str, encoder: Any, rehearses: bool) -> Any:
        """Makes of a text what `Model.generate` takes: the text itself, or a chat.

        Args:
            text: as it was given.
            encoder: the `PromptEncoder` of the model.
            rehearses: the weights are random; without a tokenizer any token ids will do.
        """
        if self.chat:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            return [*system, {"role": "user", "content": text}]
        if rehearses and encoder.tokenizer is None:
            return list(text.encode())
        return text
