"""Does the simulator predict what a pipeline does?

    python benchmarks/simulator.py [--stages 1 2 3] [--micro-batches 1 2 3 4 5 6] [--show-schedule]

Decode throughput of the demo model with 12 sequences and one thread per stage, predicted and
measured for every number of stages and micro-batches. The simulator's input is measured separately:

- how long each stage works on n rows, and rank 0's own work: with n sequences in one lane, so that
  one stage works at a time. The time of all sequences in one lane is interpolated between one more
  and one less, because that run is itself predicted;
- how long a stage works besides that, to receive, unpack, pack and send: the CPU time of its
  process minus the time on its stage;
- how long a hop takes: with one lane;
- how much stages that work at the same time slow each other (cores, memory, the system's
  scheduler): one factor, fitted to a full pipeline with two lanes more than stages and one sequence
  per lane, which is not predicted. More stages than cores also share the cores.

The machine's speed changes from second to second (the memory of a virtual machine can be half as
fast for a while). So the stages are timed right before and right after each measured run, and a run
counts only if the two agree, whatever it measured. Correctness first: every configuration gives the
same tokens.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import time

import psutil
from decode import TEXT
from results import folder_of, make_parser, write_result
from transformers import AutoTokenizer

import dist_int8
from dist_int8.config import GenerationSettings
from dist_int8.engine import Engine
from dist_int8.profiling.simulator import draw, simulate


def load(folder, args, stages):
    return dist_int8.load(
        folder,
        devices=["cpu"] * stages,
        stages=stages,
        threads_per_stage=1,
        max_sequences=args.sequences + 1,
        max_tokens=args.prompt + args.tokens,
        progress=False,
    )


def decode(model, args, prompts, num_lanes):
    """Returns every prompt's tokens, and the records of the time when all lanes decoded."""
    before = model._engine
    config = dataclasses.replace(
        before.config, num_micro_batches=num_lanes, eos_token_ids=frozenset(), max_queue=0
    )
    engine = Engine(before.pipeline, before.limits, config)
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
    """Computes the mean seconds from the end on one stage to the start on the next."""
    hops = [b[0] - a[1] for r in records for a, b in itertools.pairwise(r.spans)]
    return statistics.mean(hops) / 1e9 if hops else 0.0


def calibrate(model, args, prompts, counts):
    """Measures, per number of rows, the seconds of every stage and, last, of rank 0."""
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
    """Measures the seconds per micro-batch that each stage's process works outside its stage.

    That is its CPU time minus the time on its stage, with one lane, so that no stage waits for a
    core.
    """
    me = psutil.Process()
    ranks = [me, *sorted(me.children(), key=lambda child: child.create_time())]
    assert len(ranks) == len(model.plan.stages)

    def worked():
        return [sum(rank.cpu_times()[:2]) for rank in ranks]

    since, before = time.time_ns(), worked()
    decode(model, args, prompts[:4], 1)
    decode(model, args, prompts[:4], 1)
    seconds = [b - a for a, b in zip(before, worked(), strict=True)]
    records = [record for record in model.trace.records if record.spans[0][0] >= since]
    at_work = [
        sum(end - start for start, end in spans) / 1e9
        for spans in zip(*(record.spans for record in records), strict=True)
    ]
    return [max(0.0, a - b) / len(records) for a, b in zip(seconds, at_work, strict=True)]


def tell(model, args, prompts, repeats=5):
    """Measures medians of what hardly changes with the machine's speed."""
    decode(model, args, prompts[: args.sequences], 1)  # warm
    work = [turnarounds(model, args, prompts) for _ in range(repeats)]
    hops = [hops_of(decode(model, args, prompts[:4], 1)[1]) for _ in range(repeats)]
    return {
        "turnaround_s": [statistics.median(one) for one in zip(*work, strict=True)],
        "hop_s": statistics.median(hops),
    }


def agree(before, after, most=0.08):
    """Returns whether the machine was as fast before as after, over all stages, by rows."""
    pairs = [(sum(before[count]), sum(after[count])) for count in before]
    return all(abs(a / b - 1) <= most for a, b in pairs)


def between(before, after):
    """Computes the mean of two calibrations."""
    return {
        count: [(a + b) / 2 for a, b in zip(before[count], after[count], strict=True)]
        for count in before
    }


def cost_of(known, rows):
    """Returns (seconds of every stage, of rank 0) for `rows` rows, interpolated if not measured."""
    seconds = known.get(rows)
    if seconds is None:
        seconds = [(a + b) / 2 for a, b in zip(known[rows - 1], known[rows + 1], strict=True)]
    return seconds[:-1], seconds[-1]


def speeds_of(factor, num_stages):
    """Computes the speed of each of k stages that work at the same time, k = 1 ... num_stages."""
    cores = len(os.sched_getaffinity(0))
    return [1.0] + [factor * min(1.0, cores / count) for count in range(2, num_stages + 1)]


def fitted(known, told, num_stages, micro_batches_per_s):
    """Fits the factor that makes the simulated full pipeline as fast as the measured one."""
    low, high = 0.3, 1.5
    for _ in range(20):
        factor = (low + high) / 2
        found = predict(known, told, [1] * (num_stages + 2), factor).micro_batches_per_s
        low, high = (factor, high) if found < micro_batches_per_s else (low, factor)
    return factor


def sizes_of(num_sequences, num_lanes):
    """Returns the number of sequences of each lane, as the engine distributes them."""
    return [len(range(lane, num_sequences, num_lanes)) for lane in range(num_lanes)]


def predict(known, told, sizes, factor):
    """Simulates lanes with the given numbers of sequences."""
    costs = [cost_of(known, size) for size in sizes]
    num_stages = len(costs[0][0])
    host_s = statistics.mean(host_s for _, host_s in costs)
    first, *rest = told["turnaround_s"]
    return simulate(
        [stage_s for stage_s, _ in costs],
        hop_s=told["hop_s"],
        host_s=host_s,
        speeds=speeds_of(factor, num_stages),
        turnaround_s=[max(0.0, first - host_s), *rest],  # rank 0's own work is in both
    )


def measured(records):
    """Computes the tokens per second that leave the last stage."""
    seconds = (records[-1].spans[-1][1] - records[0].spans[-1][1]) / 1e9
    return sum(record.num_tokens for record in records[1:]) / seconds


def row_of(num_stages, num_lanes, cut, runs, dropped, told):
    """Computes the figures of one configuration: medians over its runs."""
    errors = [predicted / found - 1 for predicted, found, *_ in runs]
    return {
        "stages": num_stages,
        "micro_batches": num_lanes,
        "cut": cut,
        "predicted_tokens_per_s": statistics.median(run[0] for run in runs) if runs else None,
        "measured_tokens_per_s": statistics.median(run[1] for run in runs) if runs else None,
        "error": statistics.median(errors) if runs else None,
        "errors": errors,
        "dropped": dropped,
        "factors": [run[3] for run in runs],
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
    args = parser.parse_args()
    folder = folder_of(args)
    words = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(TEXT * 8).input_ids
    prompts = [words[3 * i : 3 * i + args.prompt] for i in range(args.sequences + 1)]
    expected, rows = None, []
    for num_stages in args.stages:
        with load(folder, args, num_stages) as model:
            cut = [stage.last_block - stage.first_block + 1 for stage in model.plan.stages]
            told = tell(model, args, prompts)
            print(f"{num_stages} stages {cut}: input {told}")

            def know(counts, model=model, num_stages=num_stages):
                """Measures what changes with the machine's speed: times by rows, full pipeline."""
                known = calibrate(model, args, prompts, counts | {1})
                full = decode(model, args, prompts[: num_stages + 2], num_stages + 2)[1]
                return known, measured(full)

            for m in args.micro_batches:
                sizes = sizes_of(args.sequences, m)
                counts = set(sizes) if m > 1 else {args.sequences - 1, args.sequences + 1}
                runs, dropped = [], 0
                before = know(counts)
                while len(runs) < args.repeats and dropped < 8 * args.repeats:
                    tokens, records = decode(model, args, prompts[: args.sequences], m)
                    expected = expected or tokens
                    assert tokens == expected, f"{num_stages} stages, {m} lanes: different tokens"
                    after = know(counts)
                    if agree(before[0], after[0]):
                        known = between(before[0], after[0])
                        full = (before[1] + after[1]) / 2
                        factor = fitted(known, told, num_stages, full) if num_stages > 1 else 1.0
                        simulation = predict(known, told, sizes, factor)
                        predicted = simulation.micro_batches_per_s * args.sequences / m
                        runs.append((predicted, measured(records), simulation, factor))
                    else:
                        dropped += 1
                    before = after
                rows.append(row_of(num_stages, m, cut, runs, dropped, told))
                if not runs:
                    print(
                        f"{num_stages} stages, {m} micro-batches: the machine's speed kept changing"
                    )
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
    errors = [abs(row["error"]) for row in rows if row["error"] is not None]
    worst, mean = max(errors), statistics.mean(errors)
    print(f"off by {worst:.1%} at worst, {mean:.1%} on average")
    setting = {key: getattr(args, key) for key in ("sequences", "prompt", "tokens", "repeats")}
    figures = {"rows": rows, "worst_error": worst, "mean_error": mean}
    setting["cores"] = len(os.sched_getaffinity(0))
    write_result("simulator", {**setting, **figures}, args.json, args.raw)


if __name__ == "__main__":
    main()
