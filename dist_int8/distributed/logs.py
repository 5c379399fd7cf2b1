"""Log records of a rank: they carry its rank and stage, and name it before the text."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger of one rank: records get the attributes `rank` and `stage`, messages a prefix.

    The prefix is in the message, not in a formatter, so that it is also there where an application
    has configured no logging or its own.
    """

    def __init__(self, name: str, rank: int) -> None:
        super().__init__(logging.getLogger(name), {"rank": rank, "stage": rank})

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        assert self.extra is not None
        kwargs["extra"] = {**self.extra, **(kwargs.get("extra") or {})}
        return f"[rank {self.extra['rank']}] {msg}", kwargs
