"""Does the simulator predict what a pipeline does?

    python benchmarks/simulator.py [--stages 1 2 3] [--micro-batches 1 2 3 4 5 6] [--show-schedule]

Decode throughput of the demo model, 12 sequences, one thread a stage, predicted and measured for
every number of stages and micro-batches. What the simulator is told is measured apart from them:

- how long each stage works on n rows, and rank 0's own work: n sequences in one lane, so that one
  stage works at a time. What all sequences in one lane take is read off between one more and one
  less, to leave out the run that is predicted;
- how long a stage turns around between two micro-batches: more lanes than stages of one sequence
  each, where one ended after the next had come;
- how much stages that work at the same time slow each other on this machine's cores: one, two and
  three processes with a whole model each, without any pipeline;
- how long a hop takes: of one lane, beside none, one and two of those processes at work.

The machine's speed changes from second to second (a virtual one's memory can be half as fast for a
while). So the stages are timed right before and right after each measured run, and a run counts
when the two agree; what is measured decides nothing. Correctness first: every configuration gives
the same tokens.
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
from dist_int8.pipeline.simulator import draw, simulate

CROWD_ROWS, CROWD_S = 4, 1.0


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
    """(tokens of every prompt, the records of the time when all lanes decoded all they have)."""
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
    full = {
        r.lane: r.num_tokens for r in sorted(records, key=lambda r: r.num_tokens) if r.kind == "D"
    }
    whole = itertools.groupby(records, lambda r: r.kind == "D" and r.num_tokens == full[r.lane])
    runs = [list(group) for is_whole, group in whole if is_whole]
    return [request.token_ids for request in requests], max(runs, key=len)


def hops_of(records):
    """Mean seconds from the end on one stage to the start on the next."""
    hops = [b[0] - a[1] for r in records for a, b in itertools.pairwise(r.spans)]
    return statistics.mean(hops) / 1e9 if hops else 0.0


def calibrate(model, args, prompts, counts):
    """Of each number of rows: seconds of every stage, and last of rank 0."""
    found = {}
    for count in counts:
        records = decode(model, args, prompts[:count], 1)[1]
        pairs = list(itertools.pairwise(records))
        back = statistics.mean(b.spans[0][0] - a.spans[-1][1] for a, b in pairs) / 1e9
        stages = zip(*(record.spans for record in records), strict=True)
        stage_s = [statistics.mean(b - a for a, b in spans) / 1e9 for spans in stages]
        found[count] = [*stage_s, max(0.0, back - hops_of(records))]
    return found


def turnarounds(model, args, prompts):
    """Median seconds between two micro-batches on each stage, where the second had come before."""
    num_stages = len(model.plan.stages)
    if num_stages == 1:
        return [0.0]  # rank 0's own work is all there is
    records = decode(model, args, prompts[: num_stages + 2], num_stages + 2)[1]
    hop_ns = 1e9 * hops_of(decode(model, args, prompts[:1], 1)[1])
    found = [0.0]  # of stage 0: rank 0's own work, which is told
    for stage in range(1, num_stages):
        gaps = [
            second.spans[stage][0] - first.spans[stage][1]
            for first, second in itertools.pairwise(records)
            if second.spans[stage - 1][1] + 2 * hop_ns < first.spans[stage][1]
        ]
        found.append(statistics.median(gaps) / 1e9 if gaps else 0.0)
    return found


def agree(before, after, most=0.08):
    """Whether the machine was as fast before as after: all stages together, by rows."""
    pairs = [(sum(before[count]), sum(after[count])) for count in before]
    return all(abs(a / b - 1) <= most for a, b in pairs)


def between(before, after):
    """The mean of two calibrations."""
    return {
        count: [(a + b) / 2 for a, b in zip(before[count], after[count], strict=True)]
        for count in before
    }


def cost_of(known, rows):
    """(seconds of every stage, of rank 0) of so many rows, or between the neighbours measured."""
    seconds = known.get(rows)
    if seconds is None:
        seconds = [(a + b) / 2 for a, b in zip(known[rows - 1], known[rows + 1], strict=True)]
    return seconds[:-1], seconds[-1]


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

    def speeds(self, repeats):
        """How fast each of k processes is, against one alone, for k = 1, 2, ...; in turn."""
        found = []
        for _ in range(repeats):
            seconds = []
            for count in range(1, len(self.workers) + 1):
                self.start(count)
                seconds.append(statistics.mean(self.wait(count)))
            found.append([seconds[0] / second for second in seconds])
        return [statistics.median(many) for many in zip(*found, strict=True)]

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
        hops.append(hops_of(records))
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


def predict(known, told, sizes):
    """The simulation of lanes of so many sequences each."""
    costs = [cost_of(known, size) for size in sizes]
    return simulate(
        [stage_s for stage_s, _ in costs],
        host_s=statistics.mean(host_s for _, host_s in costs),
        **told,
    )


def measured(records):
    """Tokens per second that left the last stage."""
    seconds = (records[-1].spans[-1][1] - records[0].spans[-1][1]) / 1e9
    return sum(record.num_tokens for record in records[1:]) / seconds


def row_of(num_stages, num_lanes, cut, runs, dropped, told):
    """The figures of one configuration: medians over its runs."""
    errors = [predicted / found - 1 for predicted, found, _ in runs]
    return {
        "stages": num_stages,
        "micro_batches": num_lanes,
        "cut": cut,
        "predicted_tokens_per_s": statistics.median(run[0] for run in runs) if runs else None,
        "measured_tokens_per_s": statistics.median(run[1] for run in runs) if runs else None,
        "error": statistics.median(errors) if runs else None,
        "errors": errors,
        "dropped": dropped,
        "told": told,
    }


def main():
    parser: argparse.ArgumentParser = make_parser(__doc__)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--show-schedule", action="store_true", help="draw the simulated runs")
    parser.add_argument("--crowd", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = folder_of(args)
    words = AutoTokenizer.from_pretrained(folder)(TEXT * 8).input_ids
    prompts = [words[3 * i : 3 * i + args.prompt] for i in range(args.sequences + 1)]
    if args.crowd:
        crowd_worker(folder, args, prompts)
        return
    crowd = Crowd(args, max(args.stages))
    speeds = crowd.speeds(args.repeats)
    print("speed of each of 1, 2, ... at once: " + ", ".join(f"{speed:.2f}" for speed in speeds))
    expected, rows = None, []
    for num_stages in args.stages:
        with load(folder, args, num_stages) as model:
            cut = [stage.last_block - stage.first_block + 1 for stage in model.plan.stages]
            decode(model, args, prompts[: args.sequences], 1)  # warm
            told = {"speeds": speeds, "turnaround_s": turnarounds(model, args, prompts)}
            if num_stages > 1:
                told["hop_s"] = hops_among(model, args, prompts, crowd, num_stages - 1)
            print(f"{num_stages} stages {cut}: told {told}")
            for m in args.micro_batches:
                sizes = sizes_of(args.sequences, m)
                counts = set(sizes) if m > 1 else {args.sequences - 1, args.sequences + 1}
                runs, dropped = [], 0
                before = calibrate(model, args, prompts, counts)
                while len(runs) < args.repeats and dropped < 8 * args.repeats:
                    tokens, records = decode(model, args, prompts[: args.sequences], m)
                    expected = expected or tokens
                    assert tokens == expected, f"{num_stages} stages, {m} lanes: other tokens"
                    after = calibrate(model, args, prompts, counts)
                    if agree(before, after):
                        simulation = predict(between(before, after), told, sizes)
                        predicted = simulation.micro_batches_per_s * args.sequences / m
                        runs.append((predicted, measured(records), simulation))
                    else:
                        dropped += 1
                    before = after
                rows.append(row_of(num_stages, m, cut, runs, dropped, told))
                if not runs:
                    print(f"{num_stages} stages, {m} micro-batches: the machine never held still")
                    continue
                simulation = runs[-1][2]
                print(
                    "{stages} stages, {micro_batches} micro-batches: predicted "
                    "{predicted_tokens_per_s:.1f} tokens/s, measured {measured_tokens_per_s:.1f}, "
                    "{error:+.1%} ({dropped} runs dropped)".format(**rows[-1]),
                    flush=True,
                )
                if args.show_schedule:
                    print(draw(simulation, 0.0, 3 * m / simulation.micro_batches_per_s))
    crowd.close()
    errors = [abs(row["error"]) for row in rows if row["error"] is not None]
    worst, mean = max(errors), statistics.mean(errors)
    print(f"off by {worst:.1%} at worst, {mean:.1%} on average")
    setting = {key: getattr(args, key) for key in ("sequences", "prompt", "tokens", "repeats")}
    figures = {"rows": rows, "worst_error": worst, "mean_error": mean}
    write_result(
        "simulator", {**setting, "cores": len(os.sched_getaffinity(0)), **figures}, args.json
    )


if __name__ == "__main__":
    main()
