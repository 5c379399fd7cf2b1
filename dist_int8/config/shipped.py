"""The configs that come with the package: example deployments and shapes of models for planning."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# A wheel holds them inside the package, a checkout beside it.
_PARENTS = (_PACKAGE, _PACKAGE.parent)


def find_shipped(path: str | Path) -> Path | str:
    """Finds configs/... among the shipped files, unless the working directory has it.

    Any other path, a hub id among them, is returned as it is.
    """
    wanted = Path(path)
    if wanted.parts[:1] != ("configs",) or wanted.exists():
        return path
    for parent in _PARENTS:
        if (parent / wanted).exists():
            return parent / wanted
    return path
