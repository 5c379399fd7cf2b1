"""Reading safetensors checkpoints tensor by tensor, every problem found before the first read."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is, read from a file's header."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name: F32, BF16, F16, I8, ..."""


class CheckpointReader:
    """The tensors of a model folder: `model.safetensors` or shards with an index.

    Opening reads every header (not the data) and raises one ValueError that lists every missing,
    damaged or contradictory file. A file is mapped only while a tensor of it is alive, so that the
    memory of a reader is one tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tensors: dict[str, StoredTensor] = {}
        problems: list[str] = []
        if (self.folder / _INDEX).is_file():
            self._open_index(problems)
        elif (self.folder / _SINGLE).is_file():
            self._tensors = dict(_header(self.folder / _SINGLE, problems))
        else:
            raise ValueError(_no_checkpoint(self.folder))
        _raise(f"{self.folder}", problems)

    def _open_index(self, problems: list[str]) -> None:
        path = self.folder / _INDEX
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}: must be a JSON object with a weight_map, got something else; download it "
                "again"
            ) from None
        for file in files:
            if Path(file).name != file:
                problems.append(f"{_INDEX} names {file!r}, which is not a file name of this folder")
            elif not (self.folder / file).is_file():
                count = sum(named == file for named in weight_map.values())
                problems.append(f"missing file {file} ({count} tensors)")
            else:
                stored = dict(_header(self.folder / file, problems))
                listed = [name for name, named in weight_map.items() if named == file]
                self._tensors.update((name, stored[name]) for name in listed if name in stored)
                absent = [name for name in listed if stored and name not in stored]
                if absent:
                    problems.append(
                        f"{file} lacks tensors that {_INDEX} lists: {', '.join(absent)}"
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """safetensors' dtype name of a tensor (F32, BF16, F16, I8, ...), from the header."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU in its stored dtype, a view of the file: copy what you keep."""
        stored = self._tensors[name]
        with safe_open(stored.path, framework="pt", device="cpu") as file:
            return file.get_tensor(name)


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model.

    Args:
        model: a folder, or a hub id ("organization/name"), whose safetensors, config and tokenizer
            files are downloaded once into Hugging Face's cache. Never Python files or pickles.
        revision: branch, tag or commit of a hub id; None: the default branch.

    Raises:
        ValueError: neither a folder nor a hub id, or a hub id that cannot be fetched.
    """
    folder = Path(model).expanduser()
    if str(model) and folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(model)):
        raise ValueError(
            f"model: must be a folder or a hub id such as 'bigscience/bloom', got {str(model)!r}: "
            "no such folder; check the path"
        )
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            "model: must be an existing folder or a hub id that can be fetched, got "
            f"{str(model)!r} ({reason}); check the path, the name or the network"
        ) from None


def _header(path: Path, problems: list[str]) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open handle is not a mapping
                entry = file.get_slice(name)
                yield name, StoredTensor(path, tuple(entry.get_shape()), str(entry.get_dtype()))
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        problems.append(f"damaged or truncated file {path.name} ({size} bytes): {error}")


def _no_checkpoint(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: must be a model folder, got no such folder; check the path"
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        return (
            f"{folder}: must hold {_SINGLE}, got {pickles[0]} (a pickle, which can run code); "
            "convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return (
        f"{folder}: must hold {_SINGLE} or {_INDEX}, got neither; give the folder of a complete "
        "transformers checkpoint"
    )


def _raise(where: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"{where}: checkpoint must be complete, got {len(problems)} problem(s): "
            f"{'; '.join(problems)}; download the checkpoint again"
        )
