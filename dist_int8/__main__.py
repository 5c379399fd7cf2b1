"""`python -m dist_int8 ...` is `dist-int8 ...`, also under `torchrun -m`."""

from dist_int8.cli.app import main

if __name__ == "__main__":
    main()
