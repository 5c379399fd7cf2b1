"""`python -m dist_int8.evaluation`: the command line of lm-evaluation-harness, knowing `dist_int8`.

The harness finds models in a list of its own, which no package can extend from outside: whoever
wants another model imports it first, as this does. Every argument is `lm_eval`'s.
"""

import importlib.util
import sys

from dist_int8.distributed.safe_path import leave_working_directory


def main() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("lm-eval is not installed; pip install 'dist_int8[eval]'")
    from dist_int8.evaluation.harness import cli_evaluate  # which registers the model

    sys.argv[0] = "python -m dist_int8.evaluation"
    cli_evaluate()


if __name__ == "__main__":
    leave_working_directory()
    main()
