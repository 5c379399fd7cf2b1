"""`python -m dist_int8.rank`: one rank that `load()` started in a plain Python session.

Reads its settings as one line of JSON from standard input and joins; when that pipe closes, rank 0
is gone and this process ends too.
"""

from __future__ import annotations

import json
import os
import sys
import threading


def _end_with_rank_0() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would still be held when Python shuts down
        pass
    os._exit(1)


def main() -> None:
    """Joins as the rank in the environment and serves its stage until rank 0 shuts down."""
    settings = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_rank_0, name="end-with-rank-0", daemon=True).start()
    from dist_int8.api import load

    load(**settings, progress=False)


if __name__ == "__main__":
    main()
