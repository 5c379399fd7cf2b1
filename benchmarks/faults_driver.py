"""The session that benchmarks/faults.py hits: a model that answers the same prompts endlessly.

A line of JSON on stdout whenever something happened: process ids of its ranks, answers so far,
whether each was that of an undisturbed run, tokens so far. Ends when its standard input closes.
"""

import json
import os
import sys
import threading

import dist_int8

PROMPTS = [[7 + i, *range(3, 20 + 60 * i)] for i in range(3)]  # 18, 78 and 138 tokens
SETTINGS = {"max_new_tokens": 40, "temperature": 0.8, "seed": 11}
OPTIONS = {
    "threads_per_stage": 1,
    "max_tokens": 224,
    "prefill_chunk": 16,
    "max_sequences": 4,
    "progress": False,
}


def main():
    given = json.loads(sys.argv[1])
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    model = dist_int8.load(given["model"], devices=["cpu"] * given["stages"], **given["options"])
    world = model._engine.pipeline.world
    count, equal, num_tokens = 0, True, 0

    def say(**more):
        ranks = {rank: child.pid for rank, child in list(world.children.items())}
        state = {"ranks": ranks, "answers": count, "equal": equal, "tokens": num_tokens}
        print(json.dumps(state | more), flush=True)

    expected = [answer.token_ids for answer in model.generate(PROMPTS, **SETTINGS)]
    say(ready=True)
    while not given["idle"]:
        answers = [[] for _ in PROMPTS]
        for token in model.generate(PROMPTS, stream=True, **SETTINGS):
            answers[token.index].append(token.token_id)
            num_tokens += 1
            if num_tokens % 20 == 0:
                say()
        count, equal = count + 1, equal and answers == expected
    threading.Event().wait()


if __name__ == "__main__":
    main()
