"""The .bin files of old checkpoints: pickles, read only if the caller asked for it.

This is the only place that unpickles. torch's restricted unpickler knows tensors and containers and
runs nothing, but has had holes (CVE-2025-32434, CVE-2026-24747), which is why safetensors is the
rule.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dist_int8.checkpoint.tensor_files import TORCH_DTYPES, StoredTensor, describe_damage

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Early versions of bitsandbytes put the name itself into their state dicts, later ones its number.
_WEIGHT_FORMATS = ("row", "col32", "col_turing", "col_ampere")


class PickleFile:
    """A .bin file as torch saved it.

    The file is opened again for every read: its pages stay in memory as long as it is open.

    Raises:
        ValueError: damaged, truncated, or not a dictionary of tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(tuple(tensor.shape), _DTYPE_NAMES[tensor.dtype], tensor.nbytes)
            for name, tensor in self._open().items()
        }

    def read_into(self, name: str, first: int, out: Tensor) -> None:
        tensor = self._open()[name]
        out.copy_(tensor[first : first + len(out)] if out.dim() else tensor)

    def _open(self) -> Mapping[str, Tensor]:
        try:
            state = torch.load(
                self._path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(self._path),  # before torch 1.6 it was not a zip file
            )
            return {name: _as_tensor(name, value) for name, value in state.items()}
        except Exception as error:  # a damaged pickle can make the unpickler raise anything
            raise ValueError(describe_damage(self._path, error)) from None


def _as_tensor(name: str, value: object) -> Tensor:
    if isinstance(value, str) and value in _WEIGHT_FORMATS:
        return torch.tensor(_WEIGHT_FORMATS.index(value), dtype=torch.uint8)
    if isinstance(value, Tensor) and value.dtype in _DTYPE_NAMES:
        return value
    kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name} is {kind}, not a tensor of a known dtype")
