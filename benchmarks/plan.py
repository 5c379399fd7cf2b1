"""What fits where? Our plan and accelerate's map for bitsandbytes; planned and real bytes.

Needs no weights and no GPU: accelerate's `infer_auto_device_map` runs on a model of meta tensors
with the rules that transformers' bitsandbytes quantizer adds (one byte per parameter, 16 bits for
parameters that it skips, 90% of every budget, no map with "cpu" in it). Real bytes are those of
stages loaded on the CPU: the demo model and two random ones.

    python benchmarks/plan.py
"""

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from results import folder_of, make_parser, write_result
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    OPTConfig,
    PretrainedConfig,
)
from transformers.quantizers.auto import AutoHfQuantizer

from dist_int8.checkpoint import StageFormat, load_stage
from dist_int8.config import Settings
from dist_int8.models import StageSlice, describe, load_config
from dist_int8.partition import CutOptions, Device, Formats, Plan, Question, ask, memory
from dist_int8.partition.cost import PS_PER_MS
from dist_int8.partition.formats import adopt_declared, choose_formats_for
from dist_int8.partition.from_settings import CUDA_RESERVE, describe_devices
from dist_int8.partition.planner import make_problem
from dist_int8.partition.profiles import PROFILES
from dist_int8.pipeline.kv_cache import KVCache

BLOOM = Path(__file__).parents[1] / "configs" / "models" / "bloom-176b"
MACHINES = ((4, "a100-80"), (3, "a100-80"), (8, "a100-80"), (5, "a100-40"), (8, "a100-40"))
MACHINES += ((4, "a100-40"),)
FORMATS = Formats(int8=True, float_size=2, vocab_size=2)
RANDOM = {
    "random bloom": BloomConfig(vocab_size=4096, hidden_size=512, n_layer=6, n_head=8),
    "random opt": OPTConfig(
        vocab_size=4096,
        hidden_size=768,
        ffn_dim=3072,
        num_hidden_layers=7,
        num_attention_heads=12,
        word_embed_proj_dim=256,
        do_layer_norm_before=False,
    ),
}
NUM_SEQUENCES, MAX_TOKENS = 4, 256


def main() -> None:
    parser = make_parser(__doc__ or "")
    args = parser.parse_args()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    config = load_config(BLOOM)
    machines = [compare(config, *machine) for machine in MACHINES]
    print_machines(machines)
    real = [planned_and_real("demo model", Path(folder_of(args)))]
    for name, random_config in RANDOM.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                random_config, dtype=torch.bfloat16, trust_remote_code=False
            )
            model.save_pretrained(folder)
            real.append(planned_and_real(name, Path(folder)))
    print_real(real)
    print()
    write_result("plan", {"machines": machines, "planned_and_real": real}, args.json, args.raw)


def compare(config: PretrainedConfig, count: int, profile: str) -> dict[str, Any]:
    """Computes both answers for BLOOM-176B on `count` devices."""
    spec = describe(config)
    budget = PROFILES[profile].memory_bytes
    devices = [Device(f"cuda:{i}", PROFILES[profile], budget, CUDA_RESERVE) for i in range(count)]
    begin = time.perf_counter()
    plan = ask(spec, devices, FORMATS, Question())
    seconds = time.perf_counter() - begin
    roomy = ask(spec, devices, FORMATS, Question(options=CutOptions("max_kv_tokens")))
    if plan.fits:
        assert all(stage.needed_bytes <= budget for stage in plan.stages)
    spilled, blocks = accelerate_map(config, count, budget)
    theirs: dict[str, Any] = {"blocks": blocks, "blocks_on_cpu": spilled, "refused": spilled > 0}
    if not spilled:
        theirs |= by_our_count(plan, spec, devices, blocks)
    return {
        "machine": f"{count} x {budget // 10**9} GB",
        "plan": {
            "fits": plan.fits,
            "blocks": [len(stage.blocks) for stage in plan.stages],
            "kv_tokens": plan.kv_tokens,
            "most_kv_tokens": roomy.kv_tokens,
            "slowest_stage_ms": max(stage.ms for stage in plan.stages),
            "missing_bytes": plan.missing_bytes,
            "suggestions": list(plan.suggestions),
            "seconds": seconds,
        },
        "accelerate": theirs,
    }


def accelerate_map(config: PretrainedConfig, count: int, budget: int) -> tuple[int, list[int]]:
    """Counts the blocks that accelerate leaves on the CPU and gives each device."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float16, trust_remote_code=False
        )
    model.tie_weights()
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_8bit=True))
    left_alone = quantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    rules: dict[str, Any] = {
        "no_split_module_classes": list(model._no_split_modules),
        "dtype": torch.int8,
        "special_dtypes": {
            name: torch.float16
            for name, _ in model.named_parameters()
            if any(module in name for module in left_alone)
        },
    }
    limits: dict[int | str, int] = {**dict.fromkeys(range(count), budget), "cpu": 10**12}
    balanced = quantizer.adjust_max_memory(get_balanced_memory(model, limits, **rules))
    found = infer_auto_device_map(model, balanced, **rules)
    places = [
        place
        for name, place in found.items()
        if name.startswith("transformer.h.") and name.count(".") == 2
    ]
    assert len(places) == config.num_hidden_layers
    return places.count("cpu"), [places.count(device) for device in range(count)]


def by_our_count(plan: Plan, spec: Any, devices: list[Device], blocks: list[int]) -> dict[str, Any]:
    """Computes KV tokens and the slowest stage of accelerate's map, with our bytes and times.

    Its tied head stays with the embedding on device 0, so the last hidden states travel back.
    """
    assert plan.workload is not None
    problem = make_problem(spec, devices, FORMATS, plan.workload)
    kv_bytes = memory.kv_bytes_per_token(spec.blocks[0], FORMATS.float_size)
    tokens, times = [], []
    for device, count in enumerate(blocks):
        table = memory.vocab_bytes(spec, FORMATS, int8=False) if device == 0 else 0
        middle = problem.weight_bytes(1, 1 + count) + table
        room = problem.rooms[device]
        assert room is not None
        tokens.append((room - middle) // (kv_bytes * count))
        head = problem.last_times[device] if device == 0 else 0
        times.append(problem.time(device, 0, count) + head)
    return {"kv_tokens": min(tokens), "slowest_stage_ms": max(times) / PS_PER_MS}


def planned_and_real(name: str, folder: Path) -> dict[str, Any]:
    """Compares planned and real bytes of weights and KV cache of two CPU stages."""
    config = load_config(folder)
    spec = describe(config)
    settings = Settings(model=str(folder), devices=["cpu", "cpu"])
    formats = choose_formats_for(adopt_declared(settings, config), config, ["cpu"])
    devices = describe_devices(settings, ["cpu", "cpu"])
    plan = ask(spec, devices, formats, Question(NUM_SEQUENCES, MAX_TOKENS))
    stages = []
    for stage in plan.stages:
        stage_slice = StageSlice(stage.blocks, first=stage.rank == 0, last=stage.rank == 1)
        module = load_stage(folder, spec, stage_slice, StageFormat(max_tokens=MAX_TOKENS))
        weights = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        cache = KVCache(
            num_blocks=len(stage.blocks),
            num_slots=NUM_SEQUENCES,
            num_kv_heads=spec.blocks[0].num_kv_heads,
            head_dim=spec.blocks[0].head_dim,
            max_tokens=MAX_TOKENS,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for planned, real in (
            (stage.weight_bytes, weights),
            (stage.kv_bytes, cache.num_bytes()),
        ):
            assert abs(planned - real) <= 0.01 * real, (name, stage, planned, real)
        stages.append(
            {
                "blocks": [stage.first_block, stage.last_block],
                "weights": [stage.weight_bytes, weights],
                "kv": [stage.kv_bytes, cache.num_bytes()],
            }
        )
    return {"model": name, "stages": stages}


def print_machines(machines: list[dict[str, Any]]) -> None:
    print(
        "| BLOOM-176B on | plan | KV tokens | slowest, ms | accelerate | KV tokens | slowest, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for machine in machines:
        ours, theirs = machine["plan"], machine["accelerate"]
        cells = [machine["machine"]]
        cells += (
            [
                "/".join(map(str, ours["blocks"])),
                f"{ours['kv_tokens']} ({ours['most_kv_tokens']})",
            ]
            if ours["fits"]
            else [f"refused: {ours['missing_bytes']} bytes missing", "-"]
        )
        cells.append(f"{ours['slowest_stage_ms']:.1f}" if ours["fits"] else "-")
        mapped = "/".join(map(str, theirs["blocks"]))
        if theirs["refused"]:
            cells += [f"{mapped}, {theirs['blocks_on_cpu']} on the CPU: refused", "-", "-"]
        else:
            cells += [mapped, str(theirs["kv_tokens"]), f"{theirs['slowest_stage_ms']:.1f}"]
        print(f"| {' | '.join(cells)} |")


def print_real(models: list[dict[str, Any]]) -> None:
    print("\n| model | stage | weights planned | held | KV planned | held |")
    print("|---|---|---|---|---|---|")
    for model in models:
        for rank, stage in enumerate(model["stages"]):
            numbers = [*stage["weights"], *stage["kv"]]
            print(f"| {model['model']} | {rank} | {' | '.join(map(str, numbers))} |")


if __name__ == "__main__":
    main()
