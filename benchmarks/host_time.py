"""What does a decoding step cost the host, and has it changed? Two checkouts of this repository.

    git worktree add ../before COMMIT; cmake -S ../before -B ../before/build; ...
    python benchmarks/host_time.py --before ../before --before-library ../before/build/_ops.so

The model is so small (4 blocks of 64 features) that a step is what the host does around it, but for
its head: CPU kernels stand in for a GPU's. Its vocabulary is that of Llama 3, because sampling used
to go through it on the host. A figure is the time of a step of `generate`, greedily and with top-p,
in processes of both checkouts in turn; the median of the rounds. Greedy answers of the demo model
to the same prompts are compared: both must have the same token ids. Without --before, this checkout
alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
}
BATCHES = (1, 8, 32)
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 0}
MODES: dict[str, dict[str, Any]] = {"greedy": {}, "top-p 0.9": SAMPLED}
NEW_TOKENS = {"greedy": 64, "top-p 0.9": 16}
PROMPTS = ("The pipeline is", "Once upon a time", "def fibonacci(n):", "In 1815,")


def measure_step(model: Any, batch: int, mode: str) -> float:
    """Microseconds of a step: what more tokens add to a call."""
    count, prompts = NEW_TOKENS[mode], [[slot + 1, 2, 3] for slot in range(batch)]

    def seconds(new_tokens: int) -> float:
        started = time.perf_counter()
        model.generate(prompts, max_new_tokens=new_tokens, model_defaults=False, **MODES[mode])
        return time.perf_counter() - started

    seconds(2)
    return statistics.median(1e6 * (seconds(1 + count) - seconds(1)) / count for _ in range(3))


def measure_here(demo: str) -> dict[str, Any]:
    """Figures and answers of the dist_int8 that this process imports."""
    import dist_int8

    settings: dict[str, Any] = {"devices": ["cpu"], "max_sequences": 32, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        with dist_int8.load(folder, random_weights=True, **settings) as model:
            steps = {
                f"{mode}, {batch}": measure_step(model, batch, mode)
                for mode in MODES
                for batch in BATCHES
            }
    with dist_int8.load(demo, **settings) as model:
        answers = model.generate(list(PROMPTS), max_new_tokens=48, model_defaults=False)
    return {"steps": steps, "answers": [answer.token_ids for answer in answers]}


def run_child(tree: Path, library: Path | None, demo: str) -> dict[str, Any]:
    environment = os.environ | ({"DIST_INT8_LIBRARY": str(library)} if library else {})
    command = [sys.executable, __file__, "--child", str(tree.resolve()), "--demo", demo]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"host_time.py: the process in {tree} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def import_from(tree: str) -> None:
    """Makes `import dist_int8` take the package of this checkout, installed or not."""
    sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in type(f).__name__]
    sys.path.insert(0, tree)


def build_parser() -> argparse.ArgumentParser:
    from results import make_parser

    parser = make_parser(__doc__ or "", takes_model=False)
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--before-library", type=Path, help="its _ops.so, of CPU kernels")
    parser.add_argument("--rounds", type=int, default=3, help="processes per checkout")
    return parser


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        import_from(sys.argv[2])
        print(json.dumps(measure_here(sys.argv[4])))
        return
    args = build_parser().parse_args()
    from results import write_result

    from dist_int8.cli.demo_model import demo_model

    demo = str(demo_model())
    trees = {"now": (ROOT, None)}
    if args.before:
        trees = {"before": (args.before, args.before_library), **trees}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for _ in range(args.rounds):
        for name, (tree, library) in trees.items():
            runs[name].append(run_child(tree, library, demo))
    answers = [run["answers"] for found in runs.values() for run in found]
    assert all(found == answers[0] for found in answers), "greedy token ids must be the same"
    table = {
        step: {name: statistics.median(run["steps"][step] for run in runs[name]) for name in trees}
        for step in runs["now"][0]["steps"]
    }
    for step, medians in table.items():
        print(f"{step:<16}" + "".join(f"  {n} {us:9.0f} us" for n, us in medians.items()))
    tokens = sum(map(len, answers[0]))
    print(f"greedy token ids of {len(trees)} checkouts are the same: {tokens} tokens")
    figures = {"us_per_step": table, "equal_tokens": tokens, "rounds": args.rounds}
    if args.before:
        command = ["git", "-C", str(args.before), "rev-parse", "HEAD"]
        figures["before_commit"] = subprocess.check_output(command, text=True).strip()
    write_result("host_time", figures, args.json, args.raw)


if __name__ == "__main__":
    main()
