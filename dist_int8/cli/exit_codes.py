"""Exit codes of the command line."""

FAILED = 1  # something went wrong while running; for `plan`, bad input
BAD_INPUT = 2
DOES_NOT_FIT = 2  # `plan`: a valid question whose answer is no
INTERRUPTED = 130
