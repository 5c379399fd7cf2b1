"""How fast does a real model decode on CPUs, compared with fp32 transformers on as many threads?

    python benchmarks/decode.py [--model FOLDER] [--threads 2] [--batches 1 8 32] [--repeats 5]

One run, interleaved repeats, medians. Correctness first: the most likely next token agrees with
that of fp32 transformers at no fewer than 95% of the prompts' positions. Both decode greedily from
the same prompts with cached keys and values; only decode steps are timed.
"""

import statistics
import time

import torch
from results import folder_of, make_parser, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

import dist_int8

TEXT = (
    "The history of the steam engine begins long before the factories of the nineteenth century. "
    "In Alexandria, Hero described a sphere that turned when water was boiled beneath it, but for "
    "many centuries nobody found a use for it beyond amusement. "
)


@torch.inference_mode()
def transformers_decode(model, input_ids, num_tokens):
    """Measures tokens per second of a bare greedy loop, without generate()'s overhead."""
    output = model(input_ids, use_cache=True)
    token_ids = output.logits[:, -1:].argmax(-1)
    started = time.perf_counter()
    for _ in range(num_tokens):
        output = model(token_ids, past_key_values=output.past_key_values, use_cache=True)
        token_ids = output.logits[:, -1:].argmax(-1)
    return num_tokens * len(input_ids) / (time.perf_counter() - started)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    folder = folder_of(args)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=False,
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    words = tokenizer(TEXT * 8).input_ids
    most = max(args.batches)
    rows = [words[i : i + 32] for i in range(most)]
    figures = {}
    with dist_int8.load(
        folder,
        devices=["cpu"],
        threads_per_stage=args.threads,
        max_sequences=most,
        max_tokens=256,
        progress=False,
    ) as ours:
        agree = ours.logits(rows[:4]).argmax(-1)
        with torch.inference_mode():
            theirs_next = theirs(torch.tensor(rows[:4])).logits.argmax(-1)
        agree = (agree == theirs_next).float().mean().item()
        assert agree >= 0.95, f"next tokens agree on {agree:.1%} of positions"
        print(f"next-token agreement with fp32: {agree:.1%}", flush=True)
        for batch in args.batches:
            prompts = rows[:batch]
            fast, slow = [], []
            for repeat in range(args.repeats + 1):  # the first warms up
                answer = ours.generate(prompts, max_new_tokens=args.tokens, model_defaults=False)
                speed = transformers_decode(theirs, torch.tensor(prompts), args.tokens)
                if repeat:
                    fast.append(answer[0].decode_tokens_per_s)
                    slow.append(speed)
            ratio = statistics.median(a / b for a, b in zip(fast, slow, strict=True))
            figures[str(batch)] = {
                "dist_int8_tokens_per_s": statistics.median(fast),
                "transformers_tokens_per_s": statistics.median(slow),
                "ratio": ratio,
            }
            print(
                f"batch {batch:3d}: dist_int8 {statistics.median(fast):7.1f} tokens/s, "
                f"transformers fp32 {statistics.median(slow):7.1f}, ratio {ratio:.2f}",
                flush=True,
            )
    setting = {"threads": args.threads, "tokens": args.tokens, "agreement": agree}
    write_result("decode", {**setting, "batches": figures}, args.json, args.raw)


if __name__ == "__main__":
    main()
