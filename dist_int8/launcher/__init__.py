"""How processes of ours begin and end: a supervisor of ranks, one rank, and SIGTERM."""
