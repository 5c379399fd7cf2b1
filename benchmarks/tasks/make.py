"""Makes the data of the tasks of this folder, from the plays that the witness was not trained on.

    python benchmarks/tasks/make.py [--documents 125] [--seed 0] [--to build/tasks]

The files in this folder are committed: `--to benchmarks/tasks` renews them.

`cloze.jsonl`: a passage without its last word, which stands in it before (as in LAMBADA).
`next_line.jsonl`: a passage and four lines, one of which is the next (as in HellaSwag).
Text: public domain, see `../public_domain.py`. The same seed makes the same files.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from public_domain import HELD_OUT, works

TO = Path(__file__).parents[2] / "build" / "tasks"
LEAST_WORDS = 30  # of a passage
_LINE = re.compile(r"[A-Z][A-Za-z',;:.!? -]{24,60}")


def cloze(play: str, rng: random.Random) -> dict[str, str] | None:
    """A passage that ends before a word which occurred in it; None where the dice fell badly."""
    start = play.find("\n\n", rng.randrange(len(play) - 1500)) + 2
    passage = play[start : start + 600]
    found = []
    for match in re.finditer(r" ([a-z]{4,})(?=[ ,.;:!?\n])", passage):
        context, word = passage[: match.start()], match[1]
        if len(context.split()) >= LEAST_WORDS and re.search(rf"\b{word}\b", context, re.I):
            found.append({"context": context, "target": word})
    return found[0] if found else None


def next_line(play: str, others: list[str], rng: random.Random) -> dict | None:
    """A passage, its next line among three of other places; None where the dice fell badly."""
    start = play.find("\n\n", rng.randrange(len(play) - 1500)) + 2
    lines = play[start : start + 500].split("\n")[:-1]
    for index in range(1, len(lines)):
        context = "\n".join(lines[:index])
        if len(context.split()) >= LEAST_WORDS and lines[index - 1].strip():
            if not _LINE.fullmatch(lines[index]):
                continue
            choices = [lines[index], *rng.sample(others, 3)]
            if len(set(choices)) < 4:
                return None
            rng.shuffle(choices)
            answer = choices.index(lines[index])
            return {"context": context, "choices": choices, "answer": answer}
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=125, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--to", type=Path, default=TO, help="folder of the files (default: build/tasks)"
    )
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    texts = works()
    plays = [texts[name] for name in HELD_OUT]
    others = [line for play in plays for line in play.split("\n") if _LINE.fullmatch(line)]
    for name in ("cloze", "next_line"):
        rng = random.Random(f"{name} {args.seed}")
        found: dict[str, dict] = {}  # by passage: none of them twice
        for _ in range(200 * args.documents):
            if len(found) == args.documents:
                break
            play = rng.choice(plays)
            made = cloze(play, rng) if name == "cloze" else next_line(play, others, rng)
            if made is not None:
                found.setdefault(made["context"], made)
        path = args.to / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in found.values()))
        print(f"{path}: {len(found)} documents, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
