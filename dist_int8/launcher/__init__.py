"""How our processes begin and end: supervisor, one rank, signals and log output."""
