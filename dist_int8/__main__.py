"""`python -m dist_int8 ...` is `dist-int8 ...`, also under `torchrun -m`."""

from dist_int8.distributed.safe_path import leave_working_directory

if __name__ == "__main__":
    leave_working_directory()
    from dist_int8.cli.app import main

    main()
