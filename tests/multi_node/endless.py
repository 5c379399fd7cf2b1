"""A caller that generates until something breaks, and says as JSON what it got and when.

endless.py FOLDER_OF_A_MODEL STEP_TIMEOUT
"""

import json
import sys
import time

import dist_int8

PROMPT = "The capital of France is"


def main() -> None:
    model_folder, step_timeout = sys.argv[1], float(sys.argv[2])
    flags = {"devices": ["cpu", "cpu"], "threads_per_stage": 1, "progress": False}
    with dist_int8.load(model_folder, step_timeout=step_timeout, max_tokens=192, **flags) as model:
        try:
            while True:
                model.generate([PROMPT], max_new_tokens=160, on_token=decoding)
        except dist_int8.RankError as error:
            got = {"type": type(error).__name__, "rank": error.rank, "message": str(error)}
            print(json.dumps(got | {"when": time.monotonic()}), flush=True)
            sys.exit(3)


def decoding(token: object) -> None:
    """Tells the test that decoding is under way."""
    print("token", flush=True)


if __name__ == "__main__":
    main()
