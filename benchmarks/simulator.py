"""Does the simulator predict what a pipeline does?

    python benchmarks/simulator.py [--stages 1 2 3] [--micro-batches 1 2 3 4 5 6] [--show-schedule]

Decode throughput of the demo model, 12 sequences, one thread a stage, predicted and measured for
every number of stages and micro-batches. What the simulator is told is measured apart from them:

- how long each stage works on n rows, and rank 0's own work: n sequences in one lane, so that one
  stage works at a time. What all sequences in one lane take is read off between one more and one
  less, to leave out the run that is predicted;
- how much stages that work at the same time slow each other on this machine's cores: one, two and
  three processes with a whole model each, without any pipeline;
- how long a hop takes: of one lane, beside none, one and two of those processes at work.

Correctness first: every configuration gives the same tokens.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

from decode import TEXT
from results import folder_of, make_parser, write_result
from transformers import AutoTokenizer

import dist_int8
from dist_int8.config import GenerationSettings
from dist_int8.engine import Engine
from dist_int8.pipeline import trace
from dist_int8.pipeline.simulator import draw, simulate

CROWD_ROWS, CROWD_S = 4, 2.0


def load(folder, args, stages):
    return dist_int8.load(
        folder,
        devices=["cpu"] * (stages if isinstance(stages, int) else len(stages)),
        stages=stages,
        threads_per_stage=1,
        max_sequences=args.sequences + 1,
        max_tokens=args.prompt + args.tokens,
        progress=False,
    )


def decode(model, args, prompts, num_lanes):
    """(tokens of every prompt, the records of the time when all lanes only decoded)."""
    before = model._engine
    engine = Engine(
        before.pipeline,
        before.limits,
        num_stages=len(model.plan.stages),
        num_micro_batches=num_lanes,
        prefill_chunk=before.prefill_chunk,
        smallest_chunk=before.smallest_chunk,
        eos_token_ids=frozenset(),
        max_queue=0,
    )
    settings = GenerationSettings(max_new_tokens=args.tokens)
    requests = [model.request(prompt, settings, i) for i, prompt in enumerate(prompts)]
    since = time.time_ns()
    for _ in engine.run(requests):
        pass
    records = [r for r in model.trace.records if r.spans[0][0] >= since]
    return [request.token_ids for request in requests], trace.steady(records)[0]


def calibrate(model, args, prompts, counts, runs):
    """Adds a run of each number of rows to `runs`: seconds of every stage and of rank 0."""
    for count in counts:
        records = decode(model, args, prompts[:count], 1)[1]
        pairs = list(itertools.pairwise(records))
        hops = [b[0] - a[1] for r in records for a, b in itertools.pairwise(r.spans)]
        hop = statistics.mean(hops) / 1e9 if hops else 0.0
        back = statistics.mean(b.spans[0][0] - a.spans[-1][1] for a, b in pairs) / 1e9
        stages = zip(*(record.spans for record in records), strict=True)
        stage_s = [statistics.mean(b - a for a, b in spans) / 1e9 for spans in stages]
        runs.setdefault(count, []).append((stage_s, max(0.0, back - hop)))


def costs_of(runs, repeat):
    """Of one repeat: seconds of every stage and of rank 0 by rows."""
    return {
        "stage_s": {count: many[repeat][0] for count, many in runs.items()},
        "host_s": {count: many[repeat][1] for count, many in runs.items()},
    }


def cost_of(costs, name, rows):
    """Of that many rows, or between the neighbours measured."""
    known = costs[name]
    if rows in known:
        return known[rows]
    less, more = known[rows - 1], known[rows + 1]
    if name == "host_s":
        return (less + more) / 2
    return [(a + b) / 2 for a, b in zip(less, more, strict=True)]


class Crowd:
    """Processes with a whole model each, which decode for a while when told to."""

    def __init__(self, args, most):
        command = [sys.executable, __file__, "--crowd", "--prompt", str(args.prompt)]
        command += ["--tokens", str(args.tokens)] + (["--model", args.model] if args.model else [])
        self.workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(most)
        ]
        for worker in self.workers:
            assert worker.stdout.readline() == "ready\n"

    def start(self, count):
        for worker in self.workers[:count]:
            worker.stdin.write("go\n")
            worker.stdin.flush()

    def wait(self, count):
        """Mean seconds of a step, when the first `count` are done."""
        return [json.loads(worker.stdout.readline()) for worker in self.workers[:count]]

    def speeds(self):
        """How fast each of k processes is, against one alone, for k = 1, 2, ..."""
        seconds = []
        for count in range(1, len(self.workers) + 1):
            self.start(count)
            seconds.append(statistics.mean(self.wait(count)))
        return [seconds[0] / second for second in seconds]

    def close(self):
        for worker in self.workers:
            worker.stdin.close()
            worker.wait()


def hops_among(model, args, prompts, crowd, most):
    """Mean seconds of a hop of one lane beside 0, 1, ... busy processes."""
    hops = []
    for count in range(most + 1):
        crowd.start(count)
        records = decode(model, args, prompts[:CROWD_ROWS], 1)[1]
        crowd.wait(count)
        waits = [b[0] - a[1] for r in records for a, b in itertools.pairwise(r.spans)]
        hops.append(statistics.mean(waits) / 1e9)
    return hops


def crowd_worker(folder, args, prompts):
    """Decodes for a while whenever it is told to, and says how long a step took."""
    with load(folder, args, 1) as model:
        decode(model, args, prompts[:CROWD_ROWS], 1)
        print("ready", flush=True)
        for _ in sys.stdin:
            begun, steps = time.monotonic(), []
            while time.monotonic() < begun + CROWD_S:
                _, records = decode(model, args, prompts[:CROWD_ROWS], 1)
                steps += [record.spans[0][1] - record.spans[0][0] for record in records]
            print(statistics.mean(steps) / 1e9, flush=True)


def sizes_of(num_sequences, num_lanes):
    """Sequences of each lane, as the engine deals them."""
    return [len(range(lane, num_sequences, num_lanes)) for lane in range(num_lanes)]


def predict(costs, speeds, sizes):
    """The simulation of lanes of so many sequences each."""
    lanes = [cost_of(costs, "stage_s", size) for size in sizes]
    host_s = statistics.mean(cost_of(costs, "host_s", size) for size in sizes)
    return simulate(lanes, hop_s=costs["hop_s"], host_s=host_s, speeds=speeds)


def measured(records):
    """Tokens per second that left the last stage."""
    seconds = (records[-1].spans[-1][1] - records[0].spans[-1][1]) / 1e9
    return sum(record.num_tokens for record in records[1:]) / seconds


def main():
    parser: argparse.ArgumentParser = make_parser(__doc__)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--show-schedule", action="store_true", help="draw the simulated runs")
    parser.add_argument("--crowd", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = folder_of(args)
    words = AutoTokenizer.from_pretrained(folder)(TEXT * 8).input_ids
    prompts = [words[3 * i : 3 * i + args.prompt] for i in range(args.sequences + 1)]
    if args.crowd:
        crowd_worker(folder, args, prompts)
        return
    counts = {size for m in args.micro_batches for size in sizes_of(args.sequences, m)}
    counts = sorted(counts - {args.sequences} | {args.sequences - 1, args.sequences + 1})
    crowd = Crowd(args, max(args.stages))
    speeds = crowd.speeds()
    print("speed of each of 1, 2, ... at once: " + ", ".join(f"{speed:.2f}" for speed in speeds))
    told = {"speeds": speeds, "cores": len(os.sched_getaffinity(0)), "costs": {}}
    expected, rows = None, []
    for num_stages in args.stages:
        with load(folder, args, num_stages) as model:
            cut = [stage.last_block - stage.first_block + 1 for stage in model.plan.stages]
            runs, apart = {m: [] for m in args.micro_batches}, {}
            for _ in range(args.repeats):  # in turn: a machine is not equally fast all the time
                calibrate(model, args, prompts, counts, apart)
                for m, speed in runs.items():
                    tokens, records = decode(model, args, prompts[: args.sequences], m)
                    expected = expected or tokens
                    assert tokens == expected, f"{num_stages} stages, {m} lanes: other tokens"
                    speed.append(measured(records))
            hop_s = [0.0]
            if num_stages > 1:
                hop_s = hops_among(model, args, prompts, crowd, num_stages - 1)
        repeats = [costs_of(apart, i) | {"hop_s": hop_s} for i in range(args.repeats)]
        costs = told["costs"][num_stages] = repeats[-1]
        print(
            f"{num_stages} stages, rows: ms of each stage + of rank 0: "
            + "; ".join(
                f"{n}: "
                + " ".join(f"{1e3 * second:.1f}" for second in costs["stage_s"][n])
                + f" + {1e3 * costs['host_s'][n]:.1f}"
                for n in counts
            )
            + "; hop beside 0, 1, ... at work: "
            + " ".join(f"{1e3 * second:.2f}" for second in costs["hop_s"])
        )
        for m, speed in runs.items():
            sizes = sizes_of(args.sequences, m)
            # each repeat is predicted from its own calibration: the machine's speed drifts
            simulations = [predict(known, speeds, sizes) for known in repeats]
            predictions = [s.micro_batches_per_s * args.sequences / m for s in simulations]
            errors = [a / b - 1 for a, b in zip(predictions, speed, strict=True)]
            error = statistics.median(errors)
            simulation = simulations[errors.index(sorted(errors)[len(errors) // 2])]
            predicted, found = statistics.median(predictions), statistics.median(speed)
            rows.append(
                {
                    "stages": num_stages,
                    "micro_batches": m,
                    "cut": cut,
                    "predicted_tokens_per_s": predicted,
                    "measured_tokens_per_s": found,
                    "error": error,
                    "errors": errors,
                }
            )
            print(
                f"{num_stages} stages, {m} micro-batches: predicted {predicted:.1f} tokens/s, "
                f"measured {found:.1f}, {error:+.1%}",
                flush=True,
            )
            if args.show_schedule:
                print(draw(simulation, 0.0, 3 * m / simulation.micro_batches_per_s))
    crowd.close()
    worst = max(abs(row["error"]) for row in rows)
    mean = statistics.mean(abs(row["error"]) for row in rows)
    print(f"off by {worst:.1%} at worst, {mean:.1%} on average")
    setting = {key: getattr(args, key) for key in ("sequences", "prompt", "tokens", "repeats")}
    figures = {"rows": rows, "worst_error": worst, "mean_error": mean}
    write_result("simulator", {**setting, **told, **figures}, args.json)


if __name__ == "__main__":
    main()
