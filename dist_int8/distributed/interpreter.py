"""The command of a Python process of ours: it runs this very package, and nothing of its folder.

`python -m` puts the working directory on sys.path, where a `yaml.py` or an `apex.py` would then run
in every rank. So processes of ours start with -P and are told where the package lies: rank 0 may
have it from a source checkout, PYTHONPATH, sys.path of a notebook or a zip file. Only the package
is taken from there, not what lies beside it, so its folder need not be on sys.path either.
PYTHONPATH is the user's own and counts, unless this process ignores it.
"""

from __future__ import annotations

import os.path
import sys
from collections.abc import Sequence

import dist_int8

_PLACES = [os.path.abspath(place) for place in dist_int8.__path__]  # before anyone changes folder
# argv: the folders of the package, separated by a newline, then what the entry point takes
_BOOT = """\
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from os.path import dirname
places = sys.argv.pop(1).split("\\n")
found = (PathFinder.find_spec("dist_int8", [dirname(place)]) for place in places)
spec = next(spec for spec in found if spec is not None and spec.loader is not None)
spec.submodule_search_locations[:] = places
class Inside:  # before the finder of an editable install, which knows another copy
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path) if name.startswith("dist_int8.") else None
sys.meta_path.insert(0, Inside)
package = sys.modules["dist_int8"] = module_from_spec(spec)
spec.loader.exec_module(package)
from {module} import main
main()
"""


def command(module: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command that runs `main()` of a module of ours in a process of its own.

    Args:
        module: full name, such as "dist_int8.launcher.rank".
        arguments: its sys.argv[1:].
    """
    boot = _BOOT.format(module=module)
    return [*interpreter(), "-c", boot, "\n".join(_PLACES), *arguments]


def interpreter() -> list[str]:
    """This Python with -P, and as deaf to environment and user site as this process is."""
    flags = sys.flags
    deaf = {"-I": flags.isolated, "-E": flags.ignore_environment, "-s": flags.no_user_site}
    return [sys.executable, "-P", *(name for name, is_set in deaf.items() if is_set)]
