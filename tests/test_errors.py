"""The errors that a caller can catch: one tree, public, in the documents."""

import inspect
import re
from pathlib import Path

import pytest

import dist_int8
from dist_int8 import errors

DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
PACKAGE = Path(errors.__file__).parent


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_is_of_the_tree_public_and_documented(error):
    assert issubclass(error, dist_int8.DistInt8Error) and issubclass(error, RuntimeError)
    assert error.__name__.endswith("Error")
    assert getattr(dist_int8, error.__name__) is error and error.__name__ in dist_int8.__all__
    assert f"`{error.__name__}`" in DOCUMENT.read_text()


def test_every_error_class_of_the_package_is_in_the_tree():
    """But for those that never leave their file, whose names begin with an underscore."""
    found = {
        name
        for path in PACKAGE.rglob("*.py")
        for name, bases in re.findall(
            r"^class ([A-Z]\w+)\(([^)]*)\)", path.read_text(), re.MULTILINE
        )
        if re.search(r"(Error|Exception)\b", bases)
    }
    assert found == {error.__name__ for error in CLASSES}


def test_a_rank_error_says_which_rank():
    error = dist_int8.RankLostError("rank 1 fell silent", 1)
    assert (error.rank, error.stage, str(error)) == (1, 1, "rank 1 fell silent")
    assert dist_int8.RankError("somebody died").rank is None
