"""`python -m dist_int8 ...` is `dist-int8 ...`, also under `torchrun -m`."""

import os
import sys

if __name__ == "__main__":
    # `python -m` puts the working directory first, where a yaml.py would be taken for the library;
    # nothing of ours comes from there, since the package itself has been found
    if not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
        del sys.path[0]
    from dist_int8.cli.app import main

    main()
