"""Does an answer depend on who shares its batch? Logits of sequences alone and among 15 others.

    python benchmarks/batch_invariance.py [--model FOLDER] [--tokens 32] [--subjects 4] [--threads 2]

Ours in the runtime, and transformers' model in fp32, with the linears of the table of methods, in
one run on the same tokens of Python's help topics: a batch of 16 sequences at once, and some of
them alone. Largest |together - alone| over all logits, relative to the largest |logit| alone.
Floating point itself is not bit-equal there, since a library may sum in another order for another
number of rows; the rows "transformers" say how much that is. For ours the batch means 16 prompts
that share micro-batches in prefill and decode, so the tokens of greedy decoding are compared too.
"""

import torch
from results import folder_of, make_parser, write_result

from dist_int8.api import load
from dist_int8.evaluation.host import Host
from dist_int8.evaluation.methods import METHODS, chosen
from dist_int8.evaluation.texts import load_tokenizer, read_text, tokens_of

NUM_SEQUENCES = 16
TARGET = 1e-5


def apart(together: torch.Tensor, alone: torch.Tensor) -> float:
    """Largest difference of logits, relative to the largest logit."""
    return ((together - alone).abs().max() / alone.abs().max()).item()


def of_host(host: Host, method: str, rows: torch.Tensor, subjects: list[int]) -> dict:
    """Of a method in transformers' model."""
    with host.computing(method):
        together = host.logits(rows)
        found = [(together[i], host.logits(rows[i : i + 1])[0]) for i in subjects]
    return {
        "largest_relative_difference": max(apart(*pair) for pair in found),
        "other_next_tokens": sum(int((a.argmax(1) != b.argmax(1)).sum()) for a, b in found),
    }


def of_ours(folder: str, rows: torch.Tensor, subjects: list[int], num_new: int, **how) -> dict:
    """Of the runtime: logits one after the other in a stream of 16, and answers in a batch of 16."""
    length = rows.shape[1] + num_new
    with load(
        folder, max_sequences=NUM_SEQUENCES, max_tokens=length, progress=False, **how
    ) as model:
        together = model.logits(rows)
        found = [(together[i], model.logits(rows[i : i + 1])[0]) for i in subjects]
        prompts = rows.tolist()
        batch = model.generate(prompts, max_new_tokens=num_new)
        answers = [
            (batch[i], model.generate([prompts[i]], max_new_tokens=num_new)[0]) for i in subjects
        ]
    return {
        "largest_relative_difference": max(apart(*pair) for pair in found),
        "other_next_tokens": sum(int((a.argmax(1) != b.argmax(1)).sum()) for a, b in found),
        "other_answers": sum(a.token_ids != b.token_ids for a, b in answers),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=32, help="of a sequence")
    parser.add_argument("--new", type=int, default=8, help="tokens that ours decodes")
    parser.add_argument("--subjects", type=int, default=4, help="sequences that also run alone")
    parser.add_argument("--methods", nargs="*", help="in transformers")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = folder_of(args)
    ids = tokens_of(load_tokenizer(folder), read_text(None)[0], NUM_SEQUENCES * args.tokens, 5000)
    rows = ids.view(NUM_SEQUENCES, args.tokens)
    subjects = list(range(0, NUM_SEQUENCES, NUM_SEQUENCES // args.subjects))[: args.subjects]
    default = [
        "transformers",
        "vector-wise",
        "llm.int8",
        "bitsandbytes",
        "bitsandbytes-0",
        "torchao",
    ]
    methods = chosen(
        args.methods or [name for name in default if name in {*chosen(None), default[0]}]
    )

    found = {
        "ours": of_ours(folder, rows, subjects, args.new, devices=["cpu"]),
        "ours, 2 stages": of_ours(folder, rows, subjects, args.new, devices=["cpu", "cpu"]),
    }
    assert found["ours"]["largest_relative_difference"] <= TARGET, found
    host = Host(folder)
    for method in methods:
        found[METHODS[method].title] = of_host(host, method, rows, subjects)
        host.forget([method])
    num_tokens = len(subjects) * args.tokens
    print(
        f"\n| method | largest relative difference | other next tokens of {num_tokens} |\n|---|---|---|"
    )
    for title, figures in found.items():
        print(
            f"| {title} | {figures['largest_relative_difference']:.1e} | {figures['other_next_tokens']} |"
        )
    path = write_result(
        "batch_invariance",
        {"tokens": args.tokens, "subjects": subjects, "threads": args.threads, "methods": found},
        args.json,
    )
    print(f"\n{path}")


if __name__ == "__main__":
    main()
