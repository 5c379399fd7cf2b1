"""Ranks that are killed, stopped and terminated: errors that name them, nothing left, recovery."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dist_int8
from dist_int8.errors import RankError, RankLostError, ShuttingDownError

OPTIONS = {"threads_per_stage": 1, "max_tokens": 128, "progress": False, "max_sequences": 4}
PROMPTS = ["To be", [5, 6, 7, 8], "or not to be, that is the question", [9]]
SAMPLED = {"max_new_tokens": 30, "temperature": 0.9, "repetition_penalty": 1.2, "seed": 3}


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children_of(model):
    return model._engine.pipeline.world.children


def stream_and_hit(model, num_tokens, rank, signum, prompts, **settings):
    """Token ids of every prompt, with one rank hit by a signal after `num_tokens` tokens."""
    answers = [[] for _ in prompts]
    for count, token in enumerate(model.generate(prompts, stream=True, **settings)):
        answers[token.index].append(token.token_id)
        if count == num_tokens:
            children_of(model)[rank].send_signal(signum)
    return answers


def test_a_rank_that_cannot_load_its_stage_says_why(tiny_llama, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"rank 1 failed: .*up_proj.weight: weights must be"):
        dist_int8.load(folder, devices=["cpu", "cpu"], **OPTIONS)
    flags = ["generate", "-m", str(folder), "-p", "a"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "dist_int8", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in (
            [*flags, "--stages", "1"],
            [*flags, "--stages", "2"],
            ["launch", "--stages", "2", *flags],
        )
    ]
    for command in started:
        _, said = command.communicate()
        assert command.returncode == 2, said
        assert "up_proj.weight: weights must be" in said and "Traceback" not in said


def test_a_rank_that_fails_before_it_joins_says_why(tiny_llama, tmp_path, monkeypatch):
    """Its own environment is what differs: a library of ours that does not load."""
    monkeypatch.setenv("DIST_INT8_LIBRARY", str(tmp_path / "gone.so"))
    with pytest.raises(RankError, match=r"rank 1 failed: ImportError: .*DIST_INT8_LIBRARY"):
        dist_int8.load(tiny_llama, devices=["cpu", "cpu"], **OPTIONS)


def test_every_waiting_caller_is_told_which_rank_was_stopped(tiny_llama):
    model = dist_int8.load(tiny_llama, devices=["cpu"] * 3, step_timeout=3.0, **OPTIONS)
    children = list(children_of(model).values())
    errors = []

    def ask():
        try:
            model.generate(PROMPTS * 20, max_new_tokens=100)
        except RankError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: model._engine.num_steps > 20, 30)
    children[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 2 and time.monotonic() - stopped < 3 + 5
    for error in errors:
        assert isinstance(error, RankLostError) and (error.rank, error.stage) == (2, 2)
        assert "rank 2 has been silent for 3 s (step_timeout)" in str(error)
    assert errors[0] is not errors[1]
    wait_until(lambda: not any(is_running(child.pid) for child in children), 10)
    with pytest.raises(RankLostError, match=r"rank 2 .* load the model again"):
        model.logits([[1]])


def test_a_rank_that_dies_while_nobody_waits_ends_the_others(tiny_llama):
    model = dist_int8.load(tiny_llama, devices=["cpu"] * 3, **OPTIONS)
    children = dict(children_of(model))
    children[1].kill()
    wait_until(lambda: not is_running(children[2].pid), 5)
    with pytest.raises(RankError, match=r"rank 1 .*SIGKILL"):
        model.generate("abc")


def test_lost_stages_are_replaced_and_the_answers_are_the_same(tiny_llama, caplog):
    with dist_int8.load(
        tiny_llama, devices=["cpu"] * 3, recover=True, max_recoveries=3, step_timeout=4.0, **OPTIONS
    ) as model:
        undisturbed = [answer.token_ids for answer in model.generate(PROMPTS, **SAMPLED)]
        long = [list(range(3, 90))]
        expected = model.generate(long, max_new_tokens=20)[0].token_ids
        survivor = children_of(model)[2]
        assert stream_and_hit(model, 25, 1, signal.SIGKILL, PROMPTS, **SAMPLED) == undisturbed
        assert children_of(model)[2] is survivor, "a rank that lives keeps its weights"
        survivor.send_signal(signal.SIGSTOP)  # before the prompt is through
        assert model.generate(long, max_new_tokens=20)[0].token_ids == expected
        children = dict(children_of(model))
        children[1].kill()  # nobody waits
        wait_until(lambda: children_of(model).get(1) not in (None, children[1]), 20)
        assert [answer.token_ids for answer in model.generate(PROMPTS, **SAMPLED)] == undisturbed
        said = caplog.text
        assert "recovery 1 of 3: rank 1" in said and "SIGKILL; restarted rank 1" in said
        assert "recovery 2 of 3: rank 2 has been silent for 4 s" in said
        with pytest.raises(RankError, match=r"rank 2 .*SIGKILL"):  # three times are enough
            stream_and_hit(model, 5, 2, signal.SIGKILL, PROMPTS, **SAMPLED)


def test_draining_lets_answers_that_run_end(tiny_llama):
    model = dist_int8.load(tiny_llama, devices=["cpu"] * 2, **OPTIONS)
    expected = [answer.token_ids for answer in model.generate(PROMPTS, max_new_tokens=60)]
    children = list(children_of(model).values())
    prompts = PROMPTS * 2  # four of them wait for a slot
    tokens, errors = [[] for _ in prompts], []

    def ask():
        try:
            for token in model.generate(prompts, stream=True, max_new_tokens=60):
                tokens[token.index].append(token.token_id)
        except ShuttingDownError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: any(tokens), 20)
    assert model.drain(60.0)
    thread.join(10)
    assert tokens == [*expected, *[[]] * 4] and len(errors) == 1
    assert not any(is_running(child.pid) for child in children)


def test_draining_stops_after_its_timeout(tiny_llama):
    model = dist_int8.load(tiny_llama, devices=["cpu"] * 2, **OPTIONS)
    stream = model.generate(PROMPTS * 30, stream=True, max_new_tokens=100)
    next(stream)
    assert not model.drain(0.0)
    with pytest.raises(ShuttingDownError, match="did not end within the drain timeout of 0 s"):
        list(stream)


def test_ranks_end_when_rank_0_is_stopped(tiny_llama):
    program = f"""
import dist_int8
model = dist_int8.load(
    {str(tiny_llama)!r}, devices=["cpu"] * 2, progress=False, step_timeout=2.0)
print(model._engine.pipeline.world.children[1].pid, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as session:
        child = int(session.stdout.readline())
        time.sleep(3.0)  # idle is not hung
        assert is_running(child)
        session.send_signal(signal.SIGSTOP)
        wait_until(lambda: not is_running(child), 10)
        session.kill()


def test_recovery_is_refused_under_a_launcher(tiny_llama, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="recover must be false under a launcher"):
        dist_int8.load(tiny_llama, devices=["cpu"] * 2, recover=True)


@pytest.mark.parametrize("recover", [False, True])
def test_a_shutdown_in_the_middle_is_no_failure_for_other_threads(tiny_llama, recover):
    model = dist_int8.load(
        tiny_llama, devices=["cpu", "cpu"], recover=recover, max_tokens=256, progress=False
    )
    seen, answering = [], [threading.Event() for _ in range(2)]

    def ask(event):
        try:
            for _ in model.generate([1, 2, 3], max_new_tokens=250, stream=True):
                event.set()
        except Exception as error:
            seen.append(error)

    threads = [threading.Thread(target=ask, args=(event,)) for event in answering]
    for thread in threads:
        thread.start()
    assert all(event.wait(60) for event in answering)  # one that begins later is refused instead
    model.shutdown()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert [type(error) for error in seen] == [ShuttingDownError, ShuttingDownError], seen


def test_a_kv_cache_beyond_the_machine_is_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"must fit this machine's .* lower max_sequences"):
        dist_int8.load(tiny_llama, devices=["cpu", "cpu"], max_sequences=10**9, progress=False)
