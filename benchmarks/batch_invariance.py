"""Does an answer depend on who shares its batch? Logits of sequences alone and among 15 others.

    python benchmarks/batch_invariance.py [--model FOLDER] [--tokens 32] [--subjects 4]
        [--threads 2] [--methods NAME ...]

Ours runs all blocks as one stage of the runtime: 16 sequences in one micro-batch, prefill and then
a decode step of one token each, against each sequence in a micro-batch of its own. The others run
in transformers' fp32 model with its linears replaced (`dist-int8 eval --list-methods`), in batches
of 16 and of 1. All get the same tokens (Python's help topics) in the same run. The figure is the
largest |together - alone| over all logits, relative to the largest |logit| alone. Floating point
itself may differ, since a library may sum in another order for another number of rows; the row
"transformers" says by how much.
"""

import torch
from results import folder_of, make_parser, write_result

from dist_int8.checkpoint import (
    StageFormat,
    find_hot_columns,
    load_stage,
    make_calibration,
)
from dist_int8.config import Settings
from dist_int8.evaluation.host import Host
from dist_int8.evaluation.methods import METHODS, chosen
from dist_int8.evaluation.texts import read_text, tokens_of
from dist_int8.models import StageSlice, TokenBatch, describe, load_config
from dist_int8.models.tokenizer import load_tokenizer
from dist_int8.pipeline.kv_cache import KVCache

NUM_SEQUENCES = 16
NUM_HOT_COLUMNS = 16
TARGET = 1e-5
OTHERS = ["vector-wise", "llm.int8", "bitsandbytes", "bitsandbytes-0", "torchao"]


def compare(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> dict:
    """Compares pairs (together, alone) of logits, [tokens, vocab] each."""
    return {
        "largest_relative_difference": max(
            ((together - alone).abs().max() / alone.abs().max()).item() for together, alone in pairs
        ),
        "other_next_tokens": sum(int((a.argmax(1) != b.argmax(1)).sum()) for a, b in pairs),
        "tokens": sum(len(alone) for _, alone in pairs),
    }


@torch.inference_mode()
def of_host(host: Host, method: str, rows: torch.Tensor, subjects: list[int]) -> dict:
    """Compares logits of a method in transformers' model."""
    with host.computing(method):
        together = host.logits(rows)
        return compare([(together[i], host.logits(rows[i : i + 1])[0]) for i in subjects])


@torch.inference_mode()
def of_ours(folder: str, rows: torch.Tensor, subjects: list[int], num_hot_columns: int) -> dict:
    """Compares logits of the runtime's stage with the default rule."""
    spec = describe(load_config(folder))
    numerics = Settings(num_hot_columns=num_hot_columns).numerics
    counts = numerics.num_hot_columns, numerics.down_hot_columns
    calibration = make_calibration(folder, spec, "random", *counts)
    stage_format = StageFormat(
        outlier_rule=numerics.outlier_rule,
        outlier_threshold=numerics.outlier_threshold,
        rotation=numerics.rotation,
        max_tokens=rows.shape[1],
    )
    hot_columns = find_hot_columns(folder, spec, calibration) if calibration else None
    stage = load_stage(folder, spec, StageSlice.whole(spec), stage_format, hot_columns=hot_columns)
    block = spec.blocks[0]

    def logits(rows: torch.Tensor) -> torch.Tensor:
        """Computes [sequences, tokens, vocab] over all tokens but the last, then the last."""
        num_sequences, num_tokens = rows.shape
        cache = KVCache(
            spec.num_blocks,
            num_sequences,
            block.num_kv_heads,
            block.head_dim,
            num_tokens,
            torch.float32,
            torch.device("cpu"),
        )
        steps = [(rows[:, :-1], 0), (rows[:, -1:], num_tokens - 1)]
        found = []
        for ids, start in steps:
            segments = [(slot, start, ids.shape[1]) for slot in range(num_sequences)]
            values = stage(TokenBatch.from_segments(ids.flatten(), segments), None, cache)
            found.append(values.view(num_sequences, ids.shape[1], -1))
        return torch.cat(found, dim=1)

    together = logits(rows)
    return compare([(together[i], logits(rows[i : i + 1])[0]) for i in subjects])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=32, help="tokens per sequence")
    parser.add_argument("--subjects", type=int, default=4, help="sequences that also run alone")
    parser.add_argument("--methods", nargs="*", help="methods in transformers")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = folder_of(args)
    installed = chosen(None)
    methods = chosen(
        args.methods or ["transformers", *(name for name in OTHERS if name in installed)]
    )
    ids = tokens_of(load_tokenizer(folder), read_text(None)[0], NUM_SEQUENCES * args.tokens, 5000)
    rows = ids.view(NUM_SEQUENCES, args.tokens)
    subjects = list(range(0, NUM_SEQUENCES, NUM_SEQUENCES // args.subjects))[: args.subjects]

    found = {
        "ours": of_ours(folder, rows, subjects, 0),
        f"ours, {NUM_HOT_COLUMNS} hot columns": of_ours(folder, rows, subjects, NUM_HOT_COLUMNS),
    }
    for title, figures in found.items():
        assert figures["largest_relative_difference"] <= TARGET, (title, figures)
    host = Host(folder)
    for method in methods:
        found[METHODS[method].title] = of_host(host, method, rows, subjects)
        host.forget([method])
    num_tokens = found["ours"]["tokens"]
    print(f"\n| method | largest relative difference | different next tokens, of {num_tokens} |")
    print("|---|---|---|")
    for title, figures in found.items():
        difference, others = figures["largest_relative_difference"], figures["other_next_tokens"]
        print(f"| {title} | {difference:.1e} | {others} |")
    print()
    write_result(
        "batch_invariance",
        {"tokens": args.tokens, "subjects": subjects, "threads": args.threads, "methods": found},
        args.json,
        args.raw,
    )


if __name__ == "__main__":
    main()
