"""What happens when ranks, launchers and callers fail: who notices, when, and what is left?

    python benchmarks/faults.py [--model FOLDER]             the table, in a few minutes
    python benchmarks/faults.py --kills 100 --seed 0         random kills in a row

The default is a small random model in three stages on the CPU. Every row is a real session in which
a rank, launcher or caller fails during prefill, during decode or while idle. It has the time until
the failure is noticed, what the caller sees, and how many processes are left after ten seconds
(none, or the run fails). With recover=True the answers must be those of an undisturbed run. Broken
links are covered by tests/multi_node.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from faults_driver import OPTIONS, PROMPTS, SETTINGS
from faults_sessions import (
    ENVIRONMENT,
    GONE_S,
    STAGES,
    Session,
    is_running,
    num_left,
    random_kills,
)
from results import make_parser, write_result

import dist_int8
from dist_int8.errors import QueueFullError, RankError

STEP_TIMEOUT_S = 4.0


def small_model(folder: str) -> str:
    """Writes a random Llama of four blocks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=288, max_position_embeddings=256, initializer_range=0.3, **sizes, **heads
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Table:
    """Collects rows and prints each at once."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, fault: str, seconds: float | None, saw: str, left: int, ok: bool = True) -> None:
        row = {"fault": fault, "seconds": seconds, "saw": saw, "left": left, "ok": ok and not left}
        self.rows.append(row)
        took = "      -" if seconds is None else f"{seconds:6.2f}s"
        print(f"{'ok ' if row['ok'] else 'BAD'} {fault:38} {took} left {left}  {saw}", flush=True)


def at_moment(model, moment: str, seen: list) -> None:
    """Waits for prefill, for decode, or until the session is idle."""
    engine, begin = model._engine, model._engine.num_steps
    while moment == "prefill" and engine.num_steps < begin + 4:
        time.sleep(0.001)
    while moment == "decode" and len(seen) < 20:
        time.sleep(0.001)


def hit(model, table: Table, name: str, rank: int, signum: int, moment: str, expected) -> None:
    """Signals a rank of a session in this process and records what its caller sees."""
    children = dict(model._engine.pipeline.world.children)
    seen, outcome = [], []

    def ask() -> None:
        answers = [[] for _ in PROMPTS]
        try:
            for token in model.generate(PROMPTS, stream=True, **SETTINGS):
                seen.append(token)
                answers[token.index].append(token.token_id)
            outcome.append(answers)
        except Exception as error:
            outcome.append(error)

    caller = threading.Thread(target=ask)
    if moment != "idle":
        caller.start()
        at_moment(model, moment, seen)
    children[rank].send_signal(signum)
    started = time.monotonic()
    if moment == "idle":
        while is_running(children[rank].pid) and time.monotonic() < started + GONE_S:
            time.sleep(0.01)
        limit = started + 60
        while not model._engine.failed and time.monotonic() < limit:
            if model._engine.pipeline.world.children.get(rank) is not children[rank]:
                break
            time.sleep(0.01)
        noticed = time.monotonic() - started
        caller.start()
    caller.join(120)
    took = noticed if moment == "idle" else time.monotonic() - started
    (got,) = outcome or ["nothing: a hang"]
    if expected is not None:
        table.add(name, took, f"the answers, equal: {got == expected}", 0, got == expected)
        return
    left = num_left([child.pid for child in children.values()])
    named = isinstance(got, RankError) and got.rank == rank
    table.add(name, took, f"{type(got).__name__}: {got}", left, named)


def ranks_hit(model_folder: str, table: Table) -> None:
    """Signals ranks above 0, without and with recovery."""
    faults = [
        (rank, signal.SIGKILL, moment)
        for rank in range(1, STAGES)
        for moment in ("prefill", "decode", "idle")
    ]
    faults += [(rank, signal.SIGSTOP, "decode") for rank in range(1, STAGES)]
    options = OPTIONS | {"step_timeout": STEP_TIMEOUT_S}
    for rank, signum, moment in faults:
        model = dist_int8.load(model_folder, devices=["cpu"] * STAGES, **options)
        name = f"{signum.name} of rank {rank}, {moment}"
        hit(model, table, name, rank, signum, moment, None)
    with dist_int8.load(
        model_folder, devices=["cpu"] * STAGES, recover=True, max_recoveries=99, **options
    ) as model:
        expected = [answer.token_ids for answer in model.generate(PROMPTS, **SETTINGS)]
        for rank, signum, moment in faults:
            name = f"recover: {signum.name} of rank {rank}, {moment}"
            hit(model, table, name, rank, signum, moment, expected)


def driver_hit(model_folder: str, table: Table) -> None:
    """Signals rank 0, which is the caller's own process."""
    for signum, idle in ((signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGSTOP, False)):
        session = Session(model_folder, idle, step_timeout=STEP_TIMEOUT_S)
        if not idle:
            session.wait(lambda s=session: s.state["tokens"] > 20, 30)
        os.kill(session.process.pid, signum)
        started = time.monotonic()
        left = num_left(session.ranks)
        took = time.monotonic() - started
        moment = "idle" if idle else "decode"
        table.add(f"{signum.name} of rank 0, {moment}", took, "(it is the caller)", left)
        session.end()


def launcher_hit(model_folder: str, table: Table) -> None:
    """Sends `dist-int8 launch` TERM, TERM twice, and KILL."""
    for signals in ([signal.SIGTERM], [signal.SIGTERM] * 2, [signal.SIGKILL]):
        name = " and ".join(signum.name for signum in signals)
        with tempfile.TemporaryDirectory() as folder:
            prompts = Path(folder) / "prompts.jsonl"
            lines = [json.dumps({"token_ids": [5, 6, 7 + i % 200]}) for i in range(20000)]
            prompts.write_text("\n".join(lines) + "\n")
            output = Path(folder) / "out.jsonl"
            command = [sys.executable, "-m", "dist_int8", "launch", "--stages", "2", "generate"]
            command += ["--model", model_folder, "--device", "cpu", "--max-new-tokens", "60"]
            command += ["--input", str(prompts), "--output", str(output)]
            launcher = subprocess.Popen(
                command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            said = []
            reader = threading.Thread(target=lambda p=launcher, s=said: s.extend(p.stderr))
            reader.start()
            deadline = time.monotonic() + 120
            while (not output.exists() or output.stat().st_size < 500) and launcher.poll() is None:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            pids = children_of(launcher.pid)
            started = time.monotonic()
            for signum in signals:
                launcher.send_signal(signum)
                time.sleep(0.2 * (len(signals) > 1))
            code = launcher.wait(120)
            took = time.monotonic() - started
            left = num_left(pids)
            reader.join()
            answers = [json.loads(line) for line in output.read_text().splitlines()]
            wanted = -signum if signum == signal.SIGKILL else 128 + signum
            saw = f"exit code {code}; {len(answers)} whole answers in the file"
            table.add(f"{name} of the launcher", took, saw, left, code == wanted and len(pids) == 2)


def children_of(pid: int) -> list[int]:
    """Lists the running children of a process."""
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def callers(model_folder: str, table: Table) -> None:
    """Lets callers leave, send too much or send nonsense while others behave."""
    options = OPTIONS | {"max_sequences": 2, "max_queue": 2}
    with dist_int8.load(model_folder, devices=["cpu"] * 2, **options) as model:
        engine = model._engine
        expected = model.generate(PROMPTS[0], **SETTINGS)[0].token_ids
        gone = model.generate(PROMPTS[1], stream=True, max_new_tokens=60)
        other = model.generate(PROMPTS[0], stream=True, **SETTINGS)
        next(gone), next(other)
        before, started = engine.num_steps, time.monotonic()
        gone.close()
        while engine.num_running > 1:
            engine.step()
        took, steps = time.monotonic() - started, engine.num_steps - before
        rest = [token.token_id for token in other]
        equal = rest == expected[1:]
        saw = f"slot free after {steps} steps, the other's answer equal: {equal}"
        table.add("caller leaves a stream", took, saw, 0, equal and steps <= 4)

        streams = [model.generate(PROMPTS[0], stream=True, **SETTINGS) for _ in range(2)]
        firsts = [next(stream) for stream in streams]  # both slots are taken
        waiting = [model.request(PROMPTS[0], model_settings()) for _ in range(2)]
        engine.add(waiting)
        started = time.monotonic()
        try:
            model.generate(PROMPTS[0], max_new_tokens=1)
            saw = "no error"
        except QueueFullError as error:
            saw = f"QueueFullError: {error}"
        took = time.monotonic() - started
        for request in waiting:
            engine.cancel(request)
        rests = [[token.token_id for token in stream] for stream in streams]
        equal = all([f.token_id, *r] == expected for f, r in zip(firsts, rests, strict=True))
        table.add("KV cache and queue full", took, f"{saw}; others equal: {equal}", 0, equal)

        stream = model.generate(PROMPTS[0], stream=True, **SETTINGS)
        first = next(stream).token_id
        started = time.monotonic()
        try:
            model.generate(PROMPTS[1], temperature=-1.0)
            saw = "no error"
        except ValueError as error:
            saw = f"ValueError: {error}"
        took = time.monotonic() - started
        equal = [first, *(token.token_id for token in stream)] == expected
        table.add("bad settings among good", took, f"{saw}; others equal: {equal}", 0, equal)


def model_settings():
    from dist_int8.config import GenerationSettings

    return GenerationSettings.from_generation_config(None, {"max_new_tokens": 4})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, help="number of random kills, instead of the table")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model_folder = args.model or small_model(folder)
        started = time.monotonic()
        if args.kills:
            figures = random_kills(model_folder, args.kills, args.seed)
            print(figures)
            bad = figures["hangs"] + figures["left"] + figures["wrong"]
            write_result("faults_kills", figures, args.json, args.raw)
        else:
            table = Table()
            for part in (ranks_hit, driver_hit, launcher_hit, callers):
                part(model_folder, table)
            bad = sum(not row["ok"] for row in table.rows)
            write_result("faults", {"rows": table.rows}, args.json, args.raw)
        print(f"{bad} bad, {time.monotonic() - started:.0f} s")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
