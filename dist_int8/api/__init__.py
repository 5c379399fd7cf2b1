"""From settings to a handle that generates."""
