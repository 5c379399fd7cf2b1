"""Which files of a model folder hold its weights: the order of transformers.

One file comes before an index of several, safetensors before pickles. A folder that was saved twice
may hold both: transformers leaves the older index there.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_int8.models.json_file import read_json
from dist_int8.models.notice import warn_once

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
_INDEX_SUFFIX = ".index.json"
_NAMED_BY_CONFIG = "transformers_weights"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightFile:
    """The file that a checkpoint is opened with.

    Attributes:
        name: a file of tensors, or an index of several.
        passed_over: other files that could have been, for a warning.
    """

    name: str
    passed_over: tuple[str, ...] = ()

    @property
    def is_index(self) -> bool:
        """Whether it lists files instead of holding tensors."""
        return self.name.endswith(_INDEX_SUFFIX)


def list_candidates(folder: Path, allow_pickle: bool) -> tuple[str, ...]:
    """Lists what a checkpoint may be opened with, preferred first.

    Args:
        folder: its config.json may name one file (`transformers_weights`), which is then the only
            candidate.
        allow_pickle: with `pytorch_model.bin` and its index.

    Raises:
        ValueError: config.json names something else than a safetensors file of the folder.
    """
    named = _read_named_file(folder / "config.json")
    if named is not None:
        return (_check_named_file(folder, named),)
    pickles = (PICKLE_SINGLE, PICKLE_INDEX) if allow_pickle else ()
    return (SINGLE, INDEX, *pickles)


def choose_weight_file(folder: Path, allow_pickle: bool) -> WeightFile:
    """Chooses what the checkpoint of a folder is opened with.

    Raises:
        ValueError: there is nothing that is read; what is there instead, and what to do.
    """
    candidates = list_candidates(folder, allow_pickle)
    present = [name for name in candidates if (folder / name).is_file()]
    if not present:
        raise ValueError(_explain_no_checkpoint(folder, candidates))
    chosen = WeightFile(present[0], tuple(present[1:]))
    if chosen.passed_over:
        _warn_of_others(folder, chosen)
    return chosen


def read_weight_map(path: Path) -> dict[str, str]:
    """Reads an index: the file of every tensor.

    Raises:
        ValueError: not an index.
    """
    weight_map: Any = read_json(path).get("weight_map")
    is_map = isinstance(weight_map, dict)
    if not is_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(
            f"{path}: must be a JSON object with a weight_map of file names, got something else; "
            "download it again"
        )
    return dict(weight_map)


def _warn_of_others(folder: Path, chosen: WeightFile) -> None:
    is_or_are = "is" if len(chosen.passed_over) == 1 else "are"
    warn_once(
        logger,
        f"{folder}: weights are read from {chosen.name}, as in transformers; "
        f"{' and '.join(chosen.passed_over)} {is_or_are} passed over (remove what is old)",
    )


def _read_named_file(path: Path) -> object:
    """Reads which file config.json names; None: none, or the config is damaged: others say so."""
    try:
        return read_json(path).get(_NAMED_BY_CONFIG)
    except ValueError:
        return None


def _check_named_file(folder: Path, named: object) -> str:
    is_name = isinstance(named, str) and Path(named).name == named
    if is_name and str(named).removesuffix(_INDEX_SUFFIX).endswith(".safetensors"):
        return str(named)
    raise ValueError(
        f"{folder}/config.json:{_NAMED_BY_CONFIG}: must be the name of a .safetensors file or of "
        f"its index, in this folder, got {named!r}; correct the field or remove it"
    )


def _explain_no_checkpoint(folder: Path, candidates: tuple[str, ...]) -> str:
    if not folder.is_dir():
        return f"{folder}: must be a model folder, got no such folder; check the path"
    wanted = f"must hold {' or '.join(candidates[:2])}"
    for name in candidates:
        if (folder / name).is_symlink() and not (folder / name).exists():
            return f"{folder}: {wanted}, got a link to a file that is gone; download {name} again"
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for suffix, advice in _OTHER_FORMATS.items():
        if others := [name for name in names if name.endswith(suffix)]:
            return f"{folder}: {wanted}, got {others[0]} {advice}"
    if others := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{folder}: {wanted}, got {others[0]}, a name that transformers does not read either; "
            "rename it if it holds the whole model under transformers' tensor names"
        )
    none = "neither" if len(candidates) > 1 else "none"
    return f"{folder}: {wanted}, got {none}; give the folder of a complete transformers checkpoint"


_OTHER_FORMATS = {
    ".bin": "(a pickle, which can run code); convert it: "
    "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)"
    ".save_pretrained(new_folder), or, if you trust who made it, allow_pickle (--allow-pickle)",
    ".gguf": "(a format of llama.cpp); give the folder of the original model instead, or convert "
    "it: AutoModelForCausalLM.from_pretrained(folder, gguf_file=..., trust_remote_code=False)"
    ".save_pretrained(new_folder)",
    ".h5": "(weights of TensorFlow); give a folder with safetensors files of the same model",
    ".msgpack": "(weights of Flax); give a folder with safetensors files of the same model",
    ".pth": "(a pickle of the original release); give the same model in transformers' format",
    ".pt": "(a pickle, which can run code); give the same model in transformers' format",
    ".onnx": "(a graph of ONNX); give the same model in transformers' format",
}
