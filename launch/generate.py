"""`dist-int8 generate` as a script, for launchers that start one script per rank.

    deepspeed --num_gpus 2 launch/generate.py --model MODEL --device cpu --prompt "Hello"
    torchrun --nproc-per-node 2 launch/generate.py --model MODEL --device cpu --prompt "Hello"
    dist-int8 launch --stages 2 launch/generate.py --model MODEL --device cpu --prompt "Hello"
    python launch/generate.py --model MODEL --device cpu --stages 2 --prompt "Hello"

The flags are those of `dist-int8 generate` (see its --help). One rank is one stage; rank 0 prints.
"""

import re
import sys

from dist_int8.cli.app import main

if __name__ == "__main__":
    # deepspeed adds --local_rank=N; every launcher puts the same number into LOCAL_RANK
    flags = [flag for flag in sys.argv[1:] if not re.fullmatch(r"--local[_-]rank=\d+", flag)]
    main(["generate", *flags])
