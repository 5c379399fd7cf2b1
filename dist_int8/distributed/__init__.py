"""The ranks of one pipeline: how they start, meet, know of each other and end."""
