"""How much faster are two stages of one thread each than one stage of one thread?

    python benchmarks/pipeline.py [--model FOLDER] [--sequences 8] [--prompt 64] [--tokens 64]

One run, interleaved repeats, medians of whole calls (prefill and decode of all sequences).
Correctness first: every configuration gives the same tokens. Both sides run with every number of
micro-batches, because while decode is bound by memory bandwidth a smaller micro-batch takes as long
as a larger one, and a pipeline then gains nothing from splitting.
"""

import statistics
import time

from decode import TEXT
from results import folder_of, make_parser, write_result
from transformers import AutoTokenizer

import dist_int8


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[1, 2, 4])
    args = parser.parse_args()
    folder = folder_of(args)
    words = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(TEXT * 40).input_ids
    prompts = [words[3 * i : 3 * i + args.prompt] for i in range(args.sequences)]
    cuts = [(stages, m) for stages in (1, 2) for m in args.micro_batches]
    models = {
        cut: dist_int8.load(
            folder,
            devices=["cpu"] * cut[0],
            threads_per_stage=1,
            micro_batches=cut[1],
            max_sequences=args.sequences,
            max_tokens=args.prompt + args.tokens,
            prefill_ratio=args.prompt / args.tokens,
            progress=False,
        )
        for cut in cuts
    }
    for stage in models[cuts[-1]].stages:
        print(stage)
    expected = None
    totals = {cut: [] for cut in cuts}
    decodes = {cut: [] for cut in cuts}
    for repeat in range(args.repeats + 1):  # the first warms up
        for cut, model in models.items():
            started = time.perf_counter()
            answers = model.generate(prompts, max_new_tokens=args.tokens, model_defaults=False)
            seconds = time.perf_counter() - started
            token_ids = [answer.token_ids for answer in answers]
            expected = expected or token_ids
            assert token_ids == expected, f"{cut} gives different tokens"
            if repeat:
                totals[cut].append(sum(map(len, token_ids)) / seconds)
                decodes[cut].append(answers[0].decode_tokens_per_s)
    rows = {}
    for cut in cuts:
        rows[f"{cut[0]} stages, {cut[1]} micro-batches"] = {
            "tokens_per_s": statistics.median(totals[cut]),
            "decode_tokens_per_s": statistics.median(decodes[cut]),
        }
    ratios = {}
    for m in args.micro_batches:
        same = zip(totals[2, m], totals[1, m], strict=True)
        ratios[f"same {m} micro-batches"] = statistics.median(a / b for a, b in same)
    best = {
        s: max((c for c in cuts if c[0] == s), key=lambda c: statistics.median(totals[c]))
        for s in (1, 2)
    }
    ratios["best against best"] = statistics.median(
        a / b for a, b in zip(totals[best[2]], totals[best[1]], strict=True)
    )
    for name, row in rows.items():
        print(
            f"{name}: {row['tokens_per_s']:.1f} tokens/s, decode {row['decode_tokens_per_s']:.1f}"
        )
    for name, ratio in ratios.items():
        print(f"two stages over one, {name}: {ratio:.2f}")
    for model in models.values():
        model.shutdown()
    setting = {"sequences": args.sequences, "prompt": args.prompt, "tokens": args.tokens}
    write_result("pipeline", {**setting, "rows": rows, "ratios": ratios}, args.json, args.raw)


if __name__ == "__main__":
    main()
