"""Every setting of a deployment does something that can be seen, or is refused by its name.

One row per field of `Settings`. A field without a row fails the test, so that a new setting comes
with what it changes.
"""

import json
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

import dist_int8
from dist_int8 import QueueFullError, RankError
from dist_int8.cli import app
from dist_int8.config import GenerationSettings, Settings
from dist_int8.distributed import interfaces
from dist_int8.partition.devices import choose_devices
from dist_int8.partition.gpus import Gpus

ROOT = Path(__file__).parents[2]
BLOOM = ["plan", "-m", str(ROOT / "configs/models/bloom-176b")]
ALONE = {"devices": ["cpu"], "max_tokens": 64, "threads_per_stage": 1, "progress": False}
IDS = [list(range(3, 33))]


@pytest.fixture(scope="module")
def base(tiny_llama):
    """What a model shows without the setting: its plan and its logits."""
    return show(tiny_llama)


def load(folder, **changes):
    return dist_int8.load(folder, **{**ALONE, **changes})


def show(folder, **changes):
    """Bytes of the first stage and logits of 30 tokens."""
    with load(folder, **changes) as model:
        return model.plan.stages[0], model.logits(IDS)


def refused(folder, **changes) -> str:
    with pytest.raises(ValueError) as caught:
        load(folder, **changes)
    return str(caught.value)


def planned(capsys, *flags):
    app.run([*BLOOM, *map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)["stages"]


def check_model(llama, **_):
    assert load(llama).folder == llama
    assert "'/no/model'" in refused("/no/model")


def check_revision(llama, caplog, **_):
    with load(llama, revision="main"):
        assert "without effect here: revision (the model is a folder)" in caplog.text


def check_stages(llama, **_):
    with load(llama, devices=None, stages=[3, 1], in_process=True) as model:
        assert [len(stage.blocks) for stage in model.plan.stages] == [3, 1]
    assert "add up to the model's 4, got [17, 13]" in refused(llama, devices=None, stages=[17, 13])


def check_devices(llama, **_):
    with load(llama, devices=["cpu", "cpu"], in_process=True) as model:
        assert [stage["device"] for stage in model.stages] == ["cpu", "cpu"]
    assert "devices must be among the GPUs seen" in refused(llama, devices=["cuda:99"])


def check_gpus(capsys, **_):
    assert len(planned(capsys, "--gpus", 5, "--memory", "80GB")) == 5
    with pytest.raises(ValueError, match="gpus must be at most the number of GPUs seen, 0"):
        choose_devices(Settings(gpus=2), Gpus((), "no driver", None))


def check_in_process(llama, **_):
    def threads():
        return threading.active_count()

    before = threads()
    with load(llama, devices=["cpu", "cpu"], in_process=True) as model:
        assert threads() > before and not model._engine.pipeline.world.children
    assert "in_process must be false" in refused(llama, in_process=True, recover=True)


def check_backend(llama, **_):
    assert "backend must be gloo where a stage is on the CPU" in refused(llama, backend="nccl")
    assert "left out with in_process" in refused(llama, backend="gloo", in_process=True)


def check_threads_per_stage(llama, **_):
    with load(llama, threads_per_stage=2) as model:
        assert model._engine._driver.call(torch.get_num_threads) == 2
    assert "at most this machine's" in refused(llama, threads_per_stage=10**6)


def check_pin_cores(llama, **_):
    program = """
import os, sys
import dist_int8
settings = dict(devices=["cpu"] * 2, threads_per_stage=1, max_tokens=64, progress=False)
model = dist_int8.load(sys.argv[1], pin_cores=eval(sys.argv[2]), **settings)
child = model._engine.pipeline.world.children[1].pid
print(len(os.sched_getaffinity(child)), len(os.sched_getaffinity(0)))
"""
    whole = str(len(os.sched_getaffinity(0)))
    for pinned, cores_of_child in (("True", "1"), ("False", whole)):
        command = [sys.executable, "-c", program, str(llama), pinned]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.split() == [cores_of_child, whole], done.stderr
    assert "pin_cores must be false for 2 stages of" in refused(
        llama, devices=["cpu"] * 2, threads_per_stage=os.cpu_count(), pin_cores=True
    )


def check_cuda_graphs(llama, caplog, **_):
    with load(llama, cuda_graphs=False) as model:
        assert "without effect here: cuda_graphs (no stage is on a GPU)" in caplog.text
        assert model._engine.pipeline.stage.graphs is None


def check_micro_batches(llama, **_):
    with load(llama, micro_batches=3) as model:
        assert model.num_micro_batches == 3


def check_max_sequences(llama, base, **_):
    stage, _ = show(llama, max_sequences=16)
    assert stage.kv_bytes == 2 * base[0].kv_bytes


def check_max_queue(llama, **_):
    with load(llama, max_sequences=1, max_queue=2) as model:
        settings = GenerationSettings(max_new_tokens=1)
        requests = [model.request([3, 4], settings, index) for index in range(4)]
        with pytest.raises(QueueFullError):
            model._engine.add(requests)
        model._engine.add(requests[:3])  # one runs, two wait


def check_max_tokens(llama, base, **_):
    stage, _ = show(llama, max_tokens=128)
    assert stage.kv_bytes == 2 * base[0].kv_bytes
    assert "at most the model's 256 positions" in refused(llama, max_tokens=257)


def check_prefill_chunk(llama, **_):
    with load(llama, prefill_chunk=10) as model:
        model.generate(IDS, max_new_tokens=1)
        assert [record.num_tokens for record in model.trace.since(0)] == [10, 10, 10]


def check_dtype(llama, base, **_):
    stage, _ = show(llama, dtype="bfloat16")
    assert 2 * stage.kv_bytes == base[0].kv_bytes


def check_int8(llama, base, **_):
    stage, _ = show(llama, int8=False)
    assert stage.weight_bytes > 2 * base[0].weight_bytes


def check_accuracy(llama, base, caplog, **_):
    rule = {"rotation": 0, "outlier_rule": "absolute", "outlier_threshold": 6.0}
    paper = show(llama, accuracy="paper")[1]
    assert torch.equal(paper, show(llama, **rule)[1]) and not torch.equal(paper, base[1])
    assert not torch.equal(show(llama, accuracy="accurate")[1], base[1])
    assert torch.equal(show(llama, accuracy="balanced")[1], base[1])
    message = refused(llama, accuracy="paper", calibrate="random")
    assert "calibrate must be off with accuracy paper, which has no hot columns" in message
    show(llama, accuracy="paper", **rule, num_hot_columns=16)
    assert "accuracy (rotation, outlier_rule and num_hot_columns are given" in caplog.text


def check_rotation(llama, base, **_):
    assert not torch.equal(show(llama, rotation=16)[1], base[1])
    before = {"outlier_rule": "row_rms", "outlier_threshold": 4.0}
    assert torch.equal(show(llama, rotation=0)[1], show(llama, rotation=0, **before)[1])
    assert "rotation must be 0 or a power of two from 2 to 1024, got 48" in refused(
        llama, rotation=48
    )


def check_outlier_rule(llama, base, **_):
    assert not torch.equal(show(llama, outlier_rule="all")[1], base[1])
    assert "must have weights that are not rotated" in refused(llama, outlier_rule="absolute")


def check_outlier_threshold(llama, base, **_):
    low = show(llama, rotation=0, outlier_rule="absolute", outlier_threshold=0.1)
    assert not torch.equal(low[1], base[1])
    message = refused(llama, outlier_threshold=4.0)
    assert "load():outlier_threshold: outlier_threshold must be left out where the rule" in message


def check_skip_modules(llama, base, **_):
    assert show(llama, skip_modules=["qkv"])[0].weight_bytes > base[0].weight_bytes
    message = refused(llama, skip_modules=["lm_heat"])
    assert "skip_modules: must name linears of the model" in message and "'lm_heat'" in message


def check_head(llama, base, **_):
    assert not torch.equal(show(llama, head="int8")[1], base[1])


def check_embedding(llama, base, **_):
    assert not torch.equal(show(llama, embedding="int8")[1], base[1])


def check_kv(llama, base, **_):
    assert show(llama, kv="int8")[0].kv_bytes < base[0].kv_bytes


def check_calibrate(llama, base, **_):
    assert show(llama, calibrate="random")[0].weight_bytes > base[0].weight_bytes
    assert "/no/text" in refused(llama, calibrate="/no/text")


def check_num_hot_columns(llama, caplog, **_):
    few, many = (show(llama, calibrate="random", num_hot_columns=n)[0] for n in (16, 32))
    assert few.weight_bytes < many.weight_bytes
    show(llama, num_hot_columns=32)
    assert "num_hot_columns (calibrate is off)" in caplog.text


def check_allow_pickle(llama, tmp_path, **_):
    from safetensors.torch import load_file

    folder = shutil.copytree(llama, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "allow_pickle" in refused(folder)
    show(folder, allow_pickle=True)


def check_random_weights(llama, tmp_path, **_):
    shutil.copy(llama / "config.json", tmp_path)
    refused(tmp_path)
    show(tmp_path, random_weights=True)


def check_memory(llama, **_):
    assert "must fit 1.00 MiB" in refused(llama, memory=["1MiB"])
    show(llama, memory={"cpu": "1GiB"})


def check_reserve(llama, caplog, **_):
    assert "1000.00 MiB of reserve" in refused(llama, memory=["1000MiB"], reserve="1000MiB")
    show(llama, reserve="1GiB")
    assert "reserve (no `memory` is given for the CPU)" in caplog.text


def check_objective(capsys, **_):
    flags = ("--gpus", 8, "--memory", "80GB", "--stages", "auto")
    assert len(planned(capsys, *flags)) > len(planned(capsys, *flags, "--objective", "latency"))


def check_prefill_ratio(capsys, caplog, llama, **_):
    show(llama, prefill_ratio=8.0)
    assert "prefill_ratio (there is one stage)" in caplog.text
    flags = ("--gpus", 8, "--memory", "80GB", "--prefill-ratio")
    cuts = [[stage["blocks"] for stage in planned(capsys, *flags, ratio)] for ratio in (0, 1000)]
    assert cuts[0] != cuts[1]


def check_profile(llama, base, **_):
    assert show(llama, profile="h100")[0].ms != base[0].ms
    assert "profile must be one of" in refused(llama, profile="h101")


def check_hosts(capsys, llama, **_):
    stages = planned(capsys, "--gpus", 2, "--memory", "200GB", "--hosts", "a,b")
    assert [stage["host"] for stage in stages] == ["a", "b"]
    message = refused(llama, devices=["cpu", "cpu"], hosts=["a", "b"])
    assert "hosts must be one machine without a launcher" in message


def check_interface(**_):
    assert interfaces.choose("lo", one_machine=False) == {"interface": "lo"}
    with pytest.raises(ValueError, match="interface"):
        interfaces.choose("no-such-interface", one_machine=False)


def check_rendezvous_timeout(llama, monkeypatch, **_):
    for key, value in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("MASTER_PORT", 29871)):
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    begin = time.monotonic()
    with pytest.raises(RankError, match="rank 1"):
        load(llama, devices=None, rendezvous_timeout=0.5)
    assert time.monotonic() - begin < 30


def check_step_timeout(llama, **_):
    with load(llama, devices=["cpu", "cpu"], step_timeout=1.0) as model:
        model.generate(IDS, max_new_tokens=1)
        model._engine.pipeline.world.children[1].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(RankError, match="rank 1"):
            model.generate(IDS, max_new_tokens=4)
        assert time.monotonic() - begin < 60


def lose_a_rank(model):
    model._engine.pipeline.world.children[1].kill()
    return model.generate(IDS, max_new_tokens=4)


def check_recover(llama, **_):
    with load(llama, devices=["cpu", "cpu"], recover=True) as model:
        assert len(lose_a_rank(model)[0].token_ids) > 0
    with load(llama, devices=["cpu", "cpu"]) as model, pytest.raises(RankError):
        lose_a_rank(model)


def check_max_recoveries(llama, **_):
    with load(llama, devices=["cpu", "cpu"], recover=True, max_recoveries=1) as model:
        lose_a_rank(model)
        with pytest.raises(RankError):
            lose_a_rank(model)


def check_drain_timeout(llama, **_):
    for seconds, finished in ((60.0, True), (1e-3, False)):
        with load(llama, max_tokens=256, drain_timeout=seconds) as model:
            stream = model.generate([3, 4], max_new_tokens=200, stream=True)
            next(stream)
            thread = threading.Thread(target=lambda tokens=stream: exhaust(tokens))
            thread.start()
            assert model.drain() is finished
            thread.join()


def exhaust(stream):
    try:
        for _ in stream:
            pass
    except dist_int8.DistInt8Error:
        pass


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if "check_" in name}


def test_every_setting_has_a_row():
    assert set(CHECKS) == set(Settings.model_fields)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_it_does_something_or_is_refused(name, request, tiny_llama):
    wanted = CHECKS[name].__code__.co_varnames[: CHECKS[name].__code__.co_argcount]
    found = {key: request.getfixturevalue(key) for key in wanted if key != "llama"}
    if "llama" in wanted:
        found["llama"] = tiny_llama
    CHECKS[name](**found)


def test_a_level_of_the_log_that_does_not_exist_is_refused(tiny_llama, monkeypatch, capsys):
    monkeypatch.setenv("DIST_INT8_LOG", "foo")
    assert "DIST_INT8_LOG must be one of error" in refused(tiny_llama)
    for command in ("plan --gpus 1", "doctor", "launch true", "verify x", "bench --profile x.yaml"):
        assert app.run(command.split()) > 0
        assert "DIST_INT8_LOG must be one of error" in capsys.readouterr().err


def test_what_changes_nothing_is_said_once_for_all_ranks(tiny_llama, tmp_path):
    """Two ranks of a launcher, one line."""
    (tmp_path / "s.yaml").write_text("max_recoveries: 7\nmax_tokens: 32\nthreads_per_stage: 1\n")
    command = [sys.executable, "-m", "dist_int8", "launch", "--stages", "2", "generate", "-m"]
    flags = ["--device", "cpu", "-p", "x", "-n", "1", "--config", str(tmp_path / "s.yaml")]
    ran = subprocess.run([*command, tiny_llama, *flags], capture_output=True, text=True, check=True)
    assert ran.stderr.count("without effect here: max_recoveries (no stage is restarted)") == 1
