"""How fast is a whole model on one GPU, against the same shape in bf16 through transformers?

    python benchmarks/gpu/model.py [--records FILE]
    python benchmarks/gpu/model.py --device cpu --small     # tries the script out, measures nothing

Llama-3-8B's shape with random weights made on the card, 16 hot columns, bf16 between the int8
products. Random weights give activations without outlier features, so the second plane is nearly
empty: what real ones cost, linear.py says. transformers' eager model has its default attention and
cache, and random weights too. Both are asked by their own `generate`, greedily. Prefill is the time
to the first token of one prompt; a step of decoding is what each further token adds, prompts of
CONTEXT tokens. Medians. "ours" is also run kernel by kernel (without CUDA graphs), whose tokens
must be the same, with an int8 KV cache, and with sampling on the card. The floor is what a step
takes to read its weights and its keys and values at the copy bandwidth measured here.
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from records import Records, make_parser
from timing import copy_tb_per_s, environment
from transformers import AutoConfig, AutoModelForCausalLM

import dist_int8

SHAPE = Path(__file__).parents[2] / "configs" / "models" / "llama-3-8b" / "config.json"
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
BATCHES = [1, 8, 32]
CONTEXT = 128
REPEATS = 3
CELL_S = 60.0
OURS: dict[str, dict[str, Any]] = {  # name of the engine, settings beside those of all
    "ours": {},
    "ours, kernel by kernel": {"cuda_graphs": False},
    "ours, int8 KV": {"kv": "int8"},
}
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 0}

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Prompts]  # prompts, new tokens -> their ids


def settings_of(small: bool) -> dict[str, Any]:
    """Arguments of load(): everything but the devices."""
    return {
        "random_weights": True,
        "calibrate": "random",
        "num_hot_columns": 16,
        "dtype": "bfloat16",
        "max_sequences": max(BATCHES),
        "max_tokens": 128 if small else 2048 + 64,
        # all prompts of a batch in one micro-batch, so that their sequences decode in step
        "prefill_chunk": max(BATCHES) * (16 if small else CONTEXT),
        "progress": False,
    }


def lengths_of(small: bool) -> tuple[list[int], int, int]:
    """Prompt lengths of prefill, context of decoding, new tokens of decoding."""
    return ([16, 64], 16, 4) if small else ([512, 2048], CONTEXT, 32)


@contextmanager
def shape_folder(small: bool) -> Iterator[Path]:
    """A folder with the config alone. Without an end token, so that every answer is full length."""
    config = json.loads(SHAPE.read_text()) | {"eos_token_id": None, "bos_token_id": None}
    with tempfile.TemporaryDirectory(prefix="shape-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config | (SMALL if small else {})))
        yield folder


def prompts_of(count: int, length: int, vocab_size: int) -> Prompts:
    generator = torch.Generator().manual_seed(count * length)
    return torch.randint(0, vocab_size, (count, length), generator=generator).tolist()


def tokens_of(model: dist_int8.Model, **how: Any) -> Generate:
    return lambda prompts, count: [
        answer.token_ids
        for answer in model.generate(prompts, max_new_tokens=count, model_defaults=False, **how)
    ]


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds(generate: Generate, prompts: Prompts, count: int) -> float:
    """Of one call; every answer has all of its tokens, so nothing is left to wait for."""
    started = time.perf_counter()
    answers = generate(prompts, count)
    assert [len(answer) for answer in answers] == [count] * len(prompts), "an answer ended early"
    return time.perf_counter() - started


def measure_prefill(generate: Generate, prompts: Prompts) -> dict[str, Any]:
    seconds(generate, prompts, 1)
    median = statistics.median(seconds(generate, prompts, 1) for _ in range(REPEATS))
    num_tokens = sum(map(len, prompts))
    return {"ms": 1e3 * median, "tokens_per_s": num_tokens / median}


def measure_decode(generate: Generate, prompts: Prompts, count: int) -> dict[str, Any]:
    """Milliseconds of a step: what `count` more tokens add to a call, a step each."""
    seconds(generate, prompts, 2)
    steps = [
        (seconds(generate, prompts, 1 + count) - seconds(generate, prompts, 1)) / count
        for _ in range(REPEATS)
    ]
    step = statistics.median(steps)
    return {"ms": 1e3 * step, "tokens_per_s": len(prompts) / step}


class Engine:
    """One way to run the model, measured cell by cell.

    Args:
        cells: where the figures go.
        name: one of `OURS`, "ours, sampling" or "transformers".
        generate: prompts, number of new tokens -> their ids.
        weight_bytes: what a step of decoding reads.
        kv_bytes: of one token in all blocks.
    """

    def __init__(
        self, cells: Cells, name: str, generate: Generate, weight_bytes: int, kv_bytes: int
    ) -> None:
        self.cells, self.name, self.generate = cells, name, generate
        self.weight_bytes, self.kv_bytes = weight_bytes, kv_bytes

    def measure(self, small: bool, vocab_size: int, copy: float) -> None:
        self.measure_decode(small, vocab_size, copy)
        for length in lengths_of(small)[0]:
            prompts = prompts_of(1, length, vocab_size)
            self.run("prefill", 1, length, lambda p=prompts: measure_prefill(self.generate, p))  # type: ignore[misc]

    def measure_decode(self, small: bool, vocab_size: int, copy: float) -> None:
        _, context, count = lengths_of(small)
        for batch in BATCHES:

            def decode(batch: int = batch) -> dict[str, Any]:
                found = measure_decode(self.generate, prompts_of(batch, context, vocab_size), count)
                read = self.weight_bytes + batch * context * self.kv_bytes
                return {**found, "floor_ms": read / copy / 1e9}

            self.run("decode", batch, context, decode)

    def run(
        self, what: str, batch: int, context: int, measure: Callable[[], dict[str, Any]]
    ) -> None:
        cell = {"engine": self.name, "what": what, "batch": batch, "context": context}
        found = self.cells.run(what, cell, measure, CELL_S)
        if found is None:
            return
        floor = f"  floor {found['floor_ms']:8.2f} ms" if "floor_ms" in found else ""
        print(
            f"{self.name:22s} {what:8s} batch {batch:3d}  context {context:5d}"
            f"  {found['ms']:9.2f} ms  {found['tokens_per_s']:10.1f} tokens/s{floor}",
            flush=True,
        )


def measure_ours(
    folder: Path, device: torch.device, small: bool, cells: Cells, copy: float
) -> None:
    answers: dict[str, Prompts] = {}
    for name, settings in OURS.items():
        with cells.guard({"engine": name}):
            answers[name] = measure_variant(name, settings, folder, device, small, cells, copy)
        free_memory(device)
    with cells.guard({"engine": "ours", "what": "equal tokens"}):
        equal = answers["ours"] == answers["ours, kernel by kernel"]
        cells.records.add("tokens", engine="ours, kernel by kernel", equal=equal)
        assert equal, "the tokens of recorded steps must be those of kernels one by one"


def measure_variant(
    name: str,
    settings: dict[str, Any],
    folder: Path,
    device: torch.device,
    small: bool,
    cells: Cells,
    copy: float,
) -> Prompts:
    """Measures `ours` with these settings, and returns its answers to the same prompts."""
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    place = "cuda:0" if device.type == "cuda" else "cpu"
    with dist_int8.load(folder, devices=[place], **settings_of(small), **settings) as model:
        plan = model.plan
        planned = {"planned": plan.stages[0].needed_bytes, "kv_bytes": plan.stages[0].kv_bytes}
        load_s = time.perf_counter() - started
        cells.records.add(
            "loaded", engine=name, seconds=load_s, planned_ms=plan.ms_per_token, **planned
        )
        print(f"loaded in {load_s:.1f} s", flush=True)
        config = json.loads((folder / "config.json").read_text())
        table = 2 * config["vocab_size"] * config["hidden_size"]  # of which a step reads some rows
        how = (plan.model_bytes - table, plan.kv_bytes_per_token)
        Engine(cells, name, tokens_of(model), *how).measure(small, config["vocab_size"], copy)
        if name == "ours":
            sampled = Engine(cells, "ours, sampling", tokens_of(model, **SAMPLING), *how)
            sampled.measure_decode(small, config["vocab_size"], copy)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            cells.records.add("memory", engine=name, peak=peak, **planned)
        prompts = prompts_of(8, lengths_of(small)[1], config["vocab_size"])
        return tokens_of(model)(prompts, 16)


@torch.inference_mode()
def measure_theirs(
    folder: Path, device: torch.device, small: bool, cells: Cells, copy: float
) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=False
        ).eval()

    def generate(prompts: Prompts, count: int) -> Prompts:
        ids = torch.tensor(prompts, device=device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].tolist()

    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    table = model.get_input_embeddings().weight.nbytes
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    kv_bytes = 2 * 2 * config.num_hidden_layers * heads
    engine = Engine(cells, "transformers", generate, num_bytes - table, kv_bytes)
    engine.measure(small, config.vocab_size, copy)


def main() -> int:
    args = make_parser(__doc__).parse_args()
    device = torch.device(args.device)
    records = Records(args.records, "model")
    cells = Cells(records, args.skip_tried)
    copy = copy_tb_per_s(device, args.small)
    records.add("environment", copy_tb_per_s=copy, **environment(device))
    print(f"copy bandwidth {copy:.2f} TB/s", flush=True)
    with shape_folder(args.small) as folder:
        for measure in (measure_ours, measure_theirs):
            with cells.guard({"engine": measure.__name__}):
                measure(folder, device, args.small, cells, copy)
            free_memory(device)
    return cells.status()


if __name__ == "__main__":
    sys.exit(main())
