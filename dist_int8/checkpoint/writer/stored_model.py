"""The checkpoint that is rewritten: config, tensors and where each parameter lies."""

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dist_int8.checkpoint.locate import is_int8_checkpoint, locate
from dist_int8.checkpoint.located import Located
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.int8.convert import swap_linears
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.config import describe, load_config
from dist_int8.models.decoder import DecoderStage
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice


class StoredModel:
    """A checkpoint folder that was opened and checked.

    Args:
        folder: of the checkpoint.
        allow_pickle: read `.bin` files where there is no safetensors file.

    Raises:
        ValueError: a damaged checkpoint, or one that does not fit its config.json.
    """

    def __init__(self, folder: Path, allow_pickle: bool) -> None:
        self.folder = folder
        self.allow_pickle = allow_pickle
        self.config: Any = load_config(folder)
        self.spec: ModelSpec = describe(self.config)
        self.reader = CheckpointReader(folder, allow_pickle=allow_pickle, complete=False)
        self.located: dict[str, Located] = locate(
            self.reader, self.spec, StageSlice.whole(self.spec)
        )
        self.is_int8 = is_int8_checkpoint(self.reader)

    @property
    def dtype(self) -> str:
        """The config's dtype ("float16"), for what is dequantized."""
        return str(self.config.dtype or "float16").removeprefix("torch.")

    @cached_property
    def linears(self) -> frozenset[str]:
        """Weights of all linears, by our names of the parameters."""
        return self.list_quantized(())

    def list_quantized(self, skip: Collection[str]) -> frozenset[str]:
        """Lists the weights that `load_stage` would quantize."""
        empty = DecoderStage.empty(self.spec, StageSlice.whole(self.spec), max_tokens=1)
        modules = dict(swap_linears(empty, skip=skip).named_modules())
        return frozenset(
            target
            for target in self.located
            if isinstance(modules[target.rpartition(".")[0]], Int8Linear)
            and target.endswith(".weight")
        )

    def check_columns(self, target: str, columns: Sequence[int]) -> None:
        """Raises ValueError for columns that the linear does not have."""
        num_inputs = self.located[target].pieces[0].shape[1]
        Int8Linear(num_inputs, 1, hot_columns=columns, device="meta")

    def choose_calibration_dtype(self, device: torch.device) -> torch.dtype:
        """Chooses the dtype that blocks run in while hot columns are found."""
        return torch.float32 if device.type == "cpu" else self.config.dtype or torch.float16
