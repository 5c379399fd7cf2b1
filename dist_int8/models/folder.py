"""What stands where a model folder should be, and what to give instead."""

import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ADAPTER_CONFIG = "adapter_config.json"


def is_folder(model: str | Path) -> bool:
    """Whether `model` is an existing folder; False for what cannot be a path at all."""
    try:
        return bool(str(model)) and Path(model).is_dir()
    except (OSError, ValueError):  # a name that is too long, or with a zero byte
        return False


def explain_no_folder(model: str | Path) -> str:
    """Says why `model` is neither a folder nor a hub id, as the end of a sentence with advice."""
    text = str(model)
    if not text:
        return "no such folder; check the path"
    path = Path(model)
    try:
        is_file, is_link = path.is_file(), path.is_symlink()
    except (OSError, ValueError):
        return "not a path; check it"
    if text.endswith(".gguf"):
        what = "a file of llama.cpp" if is_file else "no such file, and GGUF is not read"
        return (
            f"{what}; give the folder or hub id of the original model (config.json and "
            "safetensors), from which dist-int8 makes int8 itself"
        )
    if is_file:
        return f"a file; give the folder that it is in: {path.parent}"
    if is_link and not is_folder(path):
        return f"a link to {os.readlink(path)}, which is not there; check the path"
    if os.path.lexists(path):
        return "neither of them; give the folder of a model"
    return "no such folder; check the path"


def check_contents(folder: Path) -> None:
    """Checks that a folder is that of a whole model.

    Raises:
        ValueError: no config.json, or an adapter.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder}: must hold a model, got an adapter ({ADAPTER_CONFIG}); merge it into its "
            "model: AutoPeftModelForCausalLM.from_pretrained(folder, trust_remote_code=False)"
            ".merge_and_unload().save_pretrained(new_folder)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: must hold a config.json, got {_describe_contents(folder)}; give the folder "
            "of a transformers model"
        )


def _describe_contents(folder: Path) -> str:
    """Describes what a folder without config.json holds."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "none (the folder is empty)"
    if any(name.endswith(".gguf") for name in names):
        return "none but .gguf files of llama.cpp, which are not read"
    if (folder / "snapshots").is_dir():
        return "none (it is of Hugging Face's cache: the model is in a folder of snapshots/)"
    if "params.json" in names:
        return "none but the params.json of an original release"
    if "model_index.json" in names:
        return "none but the model_index.json of a diffusion pipeline"
    inside = [name for name in names if (folder / name / "config.json").is_file()]
    return f"none (but {folder / inside[0]} does)" if inside else "none"
