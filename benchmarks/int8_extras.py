"""What do hot columns and int8 beyond the blocks cost and save in bytes, KV tokens and speed?

    python benchmarks/int8_extras.py [--model FOLDER] [--threads 2] [--batches 1 8] [--repeats 5]

Each setting runs alone and all run together: the plan of BLOOM-176B on four A100-80GB (no weights
needed), and decode of a model on CPUs, interleaved, medians, relative to none of the settings.
Correctness first: the most likely next token agrees with that of int8 blocks alone at 90% of the
positions. accuracy.py measures what they cost in perplexity.
"""

import statistics
from pathlib import Path
from typing import Any

from decode import TEXT
from results import folder_of, make_parser, write_result
from transformers import AutoTokenizer

import dist_int8
from dist_int8.models import describe, load_config
from dist_int8.partition import Device, Formats, Question, ask, memory
from dist_int8.partition.from_settings import CUDA_RESERVE
from dist_int8.partition.profiles import PROFILES

BLOOM = Path(__file__).parents[1] / "configs" / "models" / "bloom-176b"
EXTRAS: dict[str, dict[str, Any]] = {
    "int8 blocks": {},
    "16 hot columns": {"calibrate": "random"},
    "head": {"head": "int8"},
    "embedding": {"embedding": "int8"},
    "head and embedding": {"head": "int8", "embedding": "int8"},
    "keys and values": {"kv": "int8"},
}
EXTRAS["all"] = {key: value for extra in EXTRAS.values() for key, value in extra.items()}
PLAIN = "int8 blocks"


def plan_of_bloom(settings: dict[str, Any]) -> dict[str, Any]:
    """Plans bytes and KV tokens on four A100-80GB."""
    spec = describe(load_config(BLOOM))
    profile = PROFILES["a100-80"]
    devices = [Device(f"cuda:{i}", profile, profile.memory_bytes, CUDA_RESERVE) for i in range(4)]
    formats = Formats(
        int8=True,
        float_size=2,
        vocab_size=2,
        head_int8="head" in settings,
        embedding_int8="embedding" in settings,
        num_hot_columns=16 if "calibrate" in settings else 0,
        kv_int8="kv" in settings,
    )
    plan = ask(spec, devices, formats, Question())
    assert plan.fits
    return {
        "weight_bytes": sum(stage.weight_bytes for stage in plan.stages),
        "kv_bytes_per_token": len(spec.blocks)
        * memory.kv_bytes_per_token(spec.blocks[0], 2, int8="kv" in settings),
        "kv_tokens": plan.kv_tokens,
    }


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    folder = folder_of(args)
    words = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(TEXT * 8).input_ids
    rows = [words[3 * i : 3 * i + args.prompt] for i in range(max(args.batches))]
    figures: dict[str, dict[str, Any]] = {}
    models = {}
    for name, settings in EXTRAS.items():
        figures[name] = {"bloom-176b, 4 x A100-80GB": plan_of_bloom(settings)}
        models[name] = dist_int8.load(
            folder,
            devices=["cpu"],
            threads_per_stage=args.threads,
            max_sequences=max(args.batches),
            max_tokens=args.prompt + args.tokens,
            progress=False,
            **settings,
        )
        stage = models[name].plan.stages[0]
        figures[name] |= {"weight_bytes": stage.weight_bytes, "kv_bytes": stage.kv_bytes}
    expected = models[PLAIN].logits(rows[:1]).argmax(-1)
    for name, model in models.items():
        agree = (model.logits(rows[:1]).argmax(-1) == expected).float().mean().item()
        assert agree >= 0.9, f"{name}: next tokens agree on {agree:.1%} of positions"
    for batch in args.batches:
        speeds: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(args.repeats + 1):  # the first warms up
            for name, model in models.items():
                answer = model.generate(
                    rows[:batch], max_new_tokens=args.tokens, model_defaults=False
                )[0]
                if repeat:
                    speeds[name].append(answer.decode_tokens_per_s)
        for name, found in speeds.items():
            figures[name][f"decode, batch {batch}"] = {
                "tokens_per_s": statistics.median(found),
                "ratio": statistics.median(
                    a / b for a, b in zip(found, speeds[PLAIN], strict=True)
                ),
            }
    for model in models.values():
        model.shutdown()
    show(figures, args.batches)
    setting = {key: getattr(args, key) for key in ("threads", "prompt", "tokens", "repeats")}
    write_result("int8_extras", {**setting, "extras": figures}, args.json, args.raw)


def show(figures: dict[str, dict[str, Any]], batches: list[int]) -> None:
    decode = [f"decode, batch {batch}" for batch in batches]
    heads = ["with", "BLOOM-176B, bytes", "KV bytes per token", "KV tokens on 4 x 80 GB"]
    heads += ["this model, bytes", "its KV cache", *(f"{name}, tokens/s" for name in decode)]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name, found in figures.items():
        bloom = found["bloom-176b, 4 x A100-80GB"]
        cells = [
            name,
            f"{bloom['weight_bytes']:,}",
            f"{bloom['kv_bytes_per_token']:,}",
            f"{bloom['kv_tokens']:,}",
            f"{found['weight_bytes']:,}",
            f"{found['kv_bytes']:,}",
            *(f"{found[b]['tokens_per_s']:.1f} ({found[b]['ratio']:.2f})" for b in decode),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
