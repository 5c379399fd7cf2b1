"""Numbers with their nouns, in the right number."""


def count(number: int, noun: str) -> str:
    """Returns "1 token" or "2 tokens"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
