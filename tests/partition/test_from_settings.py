"""load() and the planner: refused before a weight is read, pinned and saved plans that run."""

import json

import pytest

import dist_int8
from dist_int8.checkpoint import CheckpointReader
from dist_int8.cli import app
from dist_int8.config import load_settings
from dist_int8.partition import PROFILES, from_settings
from dist_int8.partition.from_settings import describe_devices, find_profile, free_budgets
from dist_int8.partition.gpus import Gpu, Gpus

OPTIONS = {"max_tokens": 64, "max_sequences": 2, "progress": False, "threads_per_stage": 1}


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"memory": ["200KB", "200KB"]}, "on cpu must fit 195.31 KiB, got"),
        (
            {"stages": [1, 2]},
            "stages must be numbers of blocks above 0 that add up to the model's 4",
        ),
        ({"stages": [4]}, "stages must be the number of devices, 2, got [4]"),
        ({"hosts": ["a", "b"]}, "hosts must be one machine without a launcher"),
        ({"profile": "a101"}, "profile must be one of t4, v100"),
        ({"memory": ["1MB", "1MB"], "reserve": "1MB"}, "of reserve"),
    ],
)
def test_refused_before_a_weight_is_read(tiny_llama, monkeypatch, settings, part):
    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(CheckpointReader, "read", read)
    with pytest.raises(ValueError) as caught:
        dist_int8.load(tiny_llama, devices=["cpu", "cpu"], **OPTIONS, **settings)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_one_gpu_for_two_ranks_is_refused_before_a_rank_is_started(tiny_llama, monkeypatch):
    gpus = Gpus((Gpu(0, "GPU", (9, 0), 80 * 1024**3, None, ()),), None, "13.0")
    monkeypatch.setattr("dist_int8.partition.devices.probe", lambda: gpus)
    monkeypatch.setattr(
        "dist_int8.distributed.spawn.spawn", lambda *_: pytest.fail("a rank was started")
    )
    with pytest.raises(ValueError, match="set backend to gloo, or in_process to true") as caught:
        dist_int8.load(tiny_llama, devices=["cuda:0", "cuda:0"], **OPTIONS)
    assert "\n" not in str(caught.value)


def test_refusal_suggests_what_would_fit(tiny_llama):
    with pytest.raises(ValueError, match=r"too much .*; cut prompts .*; or shorten the context"):
        dist_int8.load(tiny_llama, devices=["cpu"], memory=["500KB"], **OPTIONS)


def test_saved_plan_runs_the_same_stages(tiny_llama, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    flags = ["--devices", "cpu,cpu", "--stages", "3,1", "--sequences", "2", "--context", "64"]
    code = app.run(
        [
            "plan",
            "--model",
            str(tiny_llama),
            *flags,
            "--memory",
            "4MB",
            "--json",
            "--save",
            str(path),
        ]
    )
    planned = json.loads(capsys.readouterr().out)["stages"]
    assert code == 0
    plans = []
    with dist_int8.load(
        config=path, threads_per_stage=1, progress=False, on_plan=plans.append
    ) as model:
        assert model.generate("abc", max_new_tokens=3)[0].token_ids
        assert [stage["blocks"] for stage in model.stages] == [[0, 2], [3, 3]]
    (plan,) = plans
    assert [s["bytes"] for s in plan.as_dict("x")["stages"]] == [s["bytes"] for s in planned]
    assert plan.workload.num_sequences == 2 and plan.workload.max_tokens == 64


def test_describe_devices_takes_budget_and_host_from_settings():
    settings = load_settings(
        gpus=4, memory=["1GB", "2GB", "3GB", "4GB"], hosts=["a", "b"], profile=["t4", "l4"] * 2
    )
    devices = describe_devices(settings, [f"cuda:{i}" for i in range(4)])
    assert [d.budget for d in devices] == [1e9, 2e9, 3e9, 4e9]
    assert [d.host for d in devices] == ["a", "a", "b", "b"]
    assert [d.profile.name for d in devices] == ["t4", "l4", "t4", "l4"]
    assert all(d.reserve == 256 * 1024**2 for d in devices)
    cpu = describe_devices(load_settings(devices=["cpu"]), ["cpu"], budgets=[7])[0]
    assert (cpu.budget, cpu.reserve, cpu.profile.name) == (7, 0, "cpu")
    assert free_budgets(["cpu", "cpu"]) == [None, None]


def test_stages_share_the_free_memory_of_their_gpu(monkeypatch):
    gpus = tuple(Gpu(i, "GPU", (9, 0), 80 * 1024**3, (60 + i) * 1024**3, ()) for i in range(2))
    monkeypatch.setattr(from_settings, "probe", lambda: Gpus(gpus, None, "13.0"))
    context = from_settings.CUDA_CONTEXT_BYTES
    assert free_budgets(["cuda:0", "cuda:1", "cpu", "cuda:0"]) == [
        30 * 1024**3 - context,
        61 * 1024**3 - context,
        None,
        30 * 1024**3 - context,
    ]


def test_find_profile():
    names = ["t4", "v100", "a10", "a100-40", "a100-80", "l4", "l40s", "h100", "h200", "cpu"]
    assert list(PROFILES) == names
    assert find_profile("h200").memory_bytes == 141 * 10**9
