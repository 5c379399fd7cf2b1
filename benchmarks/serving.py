"""How many tokens per second does the pipeline serve when requests arrive at random?

    python benchmarks/serving.py [--stages 17,13] [--requests 64] [--rate 16] [--repeats 3]

A seeded Poisson workload: prompts of 16 to 256 tokens, answers of 8 to 64, arriving faster than
they can be served. Two stages of one thread each serve it with their lanes full, and again with one
micro-batch in flight (the same cut, the same slots); interleaved, medians over the repeats. Then
fp32 transformers, with layers placed by accelerate's device_map, answers one request after the
other with the threads of both stages (only some of the requests, since it is slow and does not
batch them). Tokens per second count new tokens until the last one arrives.

Correctness first: every answer under load equals the answer to the same request alone.
"""

import argparse
import dataclasses
import itertools
import random
import statistics
import time

import torch
import transformers
from decode import TEXT
from results import folder_of, make_parser, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

import dist_int8
from dist_int8.config import GenerationSettings
from dist_int8.engine import Request
from dist_int8.engine.text import TextStream
from dist_int8.pipeline import trace

PROMPTS, ANSWERS = (16, 256), (8, 64)


def workload(args, words):
    """Draws (arrival in seconds, prompt, new tokens) of every request."""
    draw = random.Random(args.seed)
    arrival, asked = 0.0, []
    for _ in range(args.requests):
        arrival += draw.expovariate(args.rate)
        length = draw.randint(*PROMPTS)
        begin = draw.randrange(len(words) - length)
        asked.append((arrival, words[begin : begin + length], draw.randint(*ANSWERS)))
    return asked


def serve(model, asked):
    """Returns answers, seconds from arrival to every token, and the trace's records."""
    engine = model._engine
    # answers are as long as the workload says
    engine.config = dataclasses.replace(engine.config, eos_token_ids=frozenset())
    requests = [
        Request(i, prompt, GenerationSettings(max_new_tokens=n), 0, TextStream(model.tokenizer))
        for i, (_, prompt, n) in enumerate(asked)
    ]
    first_step = engine.num_steps
    times = [[] for _ in requests]
    coming = list(range(len(requests)))
    began = time.perf_counter()
    while not all(request.ended for request in requests):
        now = time.perf_counter() - began
        while coming and asked[coming[0]][0] <= now:
            engine.add([requests[coming.pop(0)]])
        if not engine.step():
            time.sleep(1e-3)
        now = time.perf_counter() - began
        for i, request in enumerate(requests):
            times[i] += [now - asked[i][0]] * len(request.outbox)
            request.outbox.clear()
    return [r.token_ids for r in requests], times, engine.pipeline.trace.since(first_step)


def figures_of(asked, times, records):
    """Computes the figures of one run."""
    gaps = [b - a for one in times for a, b in itertools.pairwise(one)]
    end = max(arrival + one[-1] for (arrival, _, _), one in zip(asked, times, strict=True))
    return {
        "tokens_per_s": sum(map(len, times)) / (end - asked[0][0]),
        "prompt_and_new_tokens_per_s": sum(len(p) + n for _, p, n in asked) / (end - asked[0][0]),
        "seconds": end - asked[0][0],
        "first_token_s": percentiles([one[0] for one in times]),
        "next_token_s": percentiles(gaps),
        "utilisation": trace.utilisation(records),
        "micro_batches": len(records),
    }


def percentiles(values):
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 99)}


def steady_decode(model, words, count):
    """Measures the utilisation of each stage while all lanes only decode."""
    prompts = [words[3 * i : 3 * i + 32] for i in range(count)]
    before = model._engine.num_steps
    model.generate(prompts, max_new_tokens=32, model_defaults=False)
    return trace.utilisation(*trace.steady(model._engine.pipeline.trace.since(before)))


def load(folder, args, micro_batches, slots):
    stages = [int(count) for count in args.stages.split(",")]
    return dist_int8.load(
        folder,
        devices=["cpu"] * len(stages),
        stages=stages,
        threads_per_stage=1,
        micro_batches=micro_batches,
        max_sequences=slots,
        max_tokens=PROMPTS[1] + ANSWERS[1],
        prefill_chunk=args.chunk,
        progress=False,
    )


@torch.inference_mode()
def transformers_tokens_per_s(folder, asked, threads):
    """Measures new tokens per second of transformers' generate, one request at a time."""
    from accelerate import dispatch_model

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=False,
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    places = {f"model.layers.{i}": "cpu" for i in range(model.config.num_hidden_layers)}
    places |= dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    model = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    started, count = 0.0, 0
    for i, (_, prompt, n) in enumerate(asked[:1] + asked):  # the first warms up
        if i == 1:
            started = time.perf_counter()
        ids = torch.tensor([prompt])
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=n,
            min_new_tokens=n,
            pad_token_id=0,
        )
        count += (answer.shape[1] - len(prompt)) if i else 0
    return count / (time.perf_counter() - started)


def show(name, figures):
    first, following = figures["first_token_s"], figures["next_token_s"]
    print(
        f"{name}: {figures['tokens_per_s']:.1f} tokens/s, first token p50 {first['p50']:.2f} s "
        f"p99 {first['p99']:.2f} s, each next p50 {1e3 * following['p50']:.0f} ms "
        f"p99 {1e3 * following['p99']:.0f} ms, stages busy "
        + " ".join(f"{share:.0%}" for share in figures["utilisation"]),
        flush=True,
    )


def main():
    parser: argparse.ArgumentParser = make_parser(__doc__)
    parser.add_argument("--stages", default="17,13", help="blocks of each stage")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=16.0, help="requests a second")
    parser.add_argument("--slots", type=int, default=64, help="sequences in flight")
    parser.add_argument(
        "--lanes", type=int, nargs="*", help="micro-batches in flight; default: that of load()"
    )
    parser.add_argument(
        "--chunk", type=int, default=512, help="maximum number of prompt tokens per micro-batch"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--transformers-requests",
        type=int,
        default=16,
        help="number of requests for transformers; 0: none",
    )
    parser.add_argument("--alone", type=int, help="number of requests checked alone; default: all")
    args = parser.parse_args()
    folder = folder_of(args)
    words = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(TEXT * 40).input_ids
    asked = workload(args, words)
    lanes = args.lanes or [None]
    models = {f"{m or 'default'} lanes": load(folder, args, m, args.slots) for m in lanes}
    models["one micro-batch in flight"] = load(folder, args, 1, args.slots)
    main_name = next(iter(models))
    model = models[main_name]
    expected, runs = None, {name: [] for name in models}
    for repeat in range(args.repeats):
        for name, each in models.items():
            answers, times, records = serve(each, asked)
            expected = expected or answers
            assert answers == expected, f"{name}, repeat {repeat}: different tokens"
            runs[name].append(figures_of(asked, times, records))
            show(name, runs[name][-1])
    steady = {
        f"{count} sequences": steady_decode(model, words, count)
        for count in (8, 16, 32, 64)
        if count <= args.slots
    }
    for name, shares in steady.items():
        print(f"steady decode, {name}: " + " ".join(f"{share:.1%}" for share in shares))
    num_alone = len(asked) if args.alone is None else args.alone
    for i, (_, prompt, n) in enumerate(asked[:num_alone]):
        alone = model.generate(prompt, max_new_tokens=n, model_defaults=False)[0].token_ids
        assert alone == expected[i], f"request {i} gets different tokens alone"
    print(f"{num_alone} of {len(asked)} requests alone: the same tokens")
    for each in models.values():
        each.shutdown()
    medians = {
        name: sorted(many, key=lambda one: one["tokens_per_s"])[len(many) // 2]
        for name, many in runs.items()
    }
    one = runs["one micro-batch in flight"]
    ratios = {
        f"{name} over one micro-batch": statistics.median(
            a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(many, one, strict=True)
        )
        for name, many in runs.items()
        if many is not one
    }
    num_stages = len(args.stages.split(","))
    if args.transformers_requests:
        subset = asked[: args.transformers_requests]
        theirs = transformers_tokens_per_s(folder, subset, num_stages)
        print(f"transformers fp32, one after the other: {theirs:.1f} tokens/s")
        medians["transformers fp32"] = {"tokens_per_s": theirs, "requests": len(subset)}
        ratios["over transformers"] = medians[main_name]["tokens_per_s"] / theirs
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    setting = {k: v for k, v in vars(args).items() if k not in ("json", "model")}
    figures = {"rows": medians, "ratios": ratios, "steady_decode": steady, "same_alone": num_alone}
    write_result("serving", {**setting, **figures}, args.json, args.raw)


if __name__ == "__main__":
    main()
