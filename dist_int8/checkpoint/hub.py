"""Model folders, local or from a hub."""

import glob
import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from dist_int8.checkpoint.weight_files import WeightFile, list_candidates, read_weight_map
from dist_int8.models.folder import HUB_ID, explain_no_folder, is_folder

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Never Python files, and only the weights that are read: hubs keep other formats beside them.
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


def resolve_model(
    model: str | Path,
    revision: str | None = None,
    *,
    allow_pickle: bool = False,
    weights: bool = True,
) -> Path:
    """Finds the local folder of a model, downloading it if need be.

    Args:
        model: a folder, or a hub id ("organization/name"), whose config, tokenizer and safetensors
            files are downloaded once into Hugging Face's cache, with progress on stderr; an
            interrupted download is resumed. All files are of one commit.
        revision: branch, tag or commit of a hub id; None: the default branch.
        allow_pickle: fetch `pytorch_model.bin` or its shards if there is no safetensors file.
        weights: False: fetch only the small files.

    Raises:
        ValueError: neither a folder nor a hub id, or a hub id that cannot be fetched.
    """
    folder = Path(model).expanduser()
    if str(model) and is_folder(folder):
        return folder
    if os.path.lexists(folder) or not HUB_ID.fullmatch(str(model)):
        raise ValueError(
            f"model: must be a folder or a hub id such as 'bigscience/bloom', got {str(model)!r}: "
            f"{explain_no_folder(folder if str(model) else model)}"
        )
    try:
        # the folder is named after its commit, which pins what is fetched next
        folder = Path(snapshot_download(str(model), revision=revision, allow_patterns=_SMALL_FILES))
        if weights:
            commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
            files = _list_weight_files(str(model), commit, folder, allow_pickle)
            folder = Path(snapshot_download(str(model), revision=commit, allow_patterns=files))
        return folder
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            "model: must be an existing folder or a hub id that can be fetched, got "
            f"{str(model)!r} ({reason}); check the path, the name or the network"
        ) from None


def _list_weight_files(
    model: str, commit: str | None, folder: Path, allow_pickle: bool
) -> list[str]:
    """Lists the files that the reader will open."""
    candidates = [WeightFile(name) for name in list_candidates(folder, allow_pickle)]
    last_single = [candidate for candidate in candidates if not candidate.is_index][-1:]
    for candidate in candidates:
        if candidate.is_index:
            if (folder / candidate.name).is_file():  # one of the small files
                files = sorted(set(read_weight_map(folder / candidate.name).values()))
                return [glob.escape(file) for file in files]
            continue
        try:
            hf_hub_download(model, candidate.name, revision=commit)
        except EntryNotFoundError as error:
            has_index = any((folder / other.name).is_file() for other in candidates)
            is_unreachable = isinstance(error, LocalEntryNotFoundError)  # and not in the cache
            if is_unreachable and not has_index and candidate in last_single:
                raise
            continue
        return [candidate.name]
    return []  # the reader says that there is none
