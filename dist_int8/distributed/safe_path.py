"""`python -m` without the working directory on its path. Imports what Python itself has loaded."""

import os
import sys


def leave_working_directory() -> None:
    """Takes the working directory off the path, where `python -m` has put it first.

    A yaml.py there would be taken for the library. Nothing of ours comes from there: the package
    itself has been found.
    """
    if not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
        del sys.path[0]
