"""GPUs: choosing devices, and querying a driver (a small fake) through cuda-python."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_int8.api.placement import find_gpu_owners
from dist_int8.config import load_settings
from dist_int8.distributed.environment import Launched
from dist_int8.partition.devices import choose_devices, connects_over_nccl
from dist_int8.partition.gpus import Gpu, Gpus

NONE = Gpus((), "no CUDA driver is installed", None)
TWO = Gpus(tuple(Gpu(i, "GPU", (8, 0), 80 * 1024**3, None, ()) for i in range(2)), None, "13.0")
PROBE = """
import dataclasses, json
from dist_int8.partition.gpus import probe
print(json.dumps(dataclasses.asdict(probe())))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Folder with a libcuda.so.1 that has two GPUs."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("driver_of_two_gpus.c")
    compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
    command = [compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source]
    subprocess.run(command, check=True)
    return folder


def probe_with(driver, **environment):
    environment = {"LD_LIBRARY_PATH": str(driver), **environment}
    visible = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    answer = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=visible | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout)


def test_probe_reads_gpus_from_the_driver(driver):
    found = probe_with(driver)
    assert found["driver"] == "13.0" and found["reason"] is None
    first, second = found["gpus"]
    assert first["name"] == "First GPU" and second["name"] == "Second GPU"
    assert (first["index"], second["index"]) == (0, 1)
    assert first["compute_capability"] == [8, 0] and second["compute_capability"] == [9, 0]
    assert first["total_bytes"] == 80 * 1024**3 and second["total_bytes"] == 79 * 1024**3
    assert first["peers"] == [1] and second["peers"] == []
    assert set(first) == {field.name for field in dataclasses.fields(Gpu)}


def test_probe_explains_that_no_gpu_is_visible(driver):
    found = probe_with(driver, CUDA_VISIBLE_DEVICES="")
    assert found["gpus"] == [] and "CUDA_VISIBLE_DEVICES" in found["reason"]


def test_probe_reports_a_failing_driver(driver):
    found = probe_with(driver, DRIVER_REFUSES="803")
    assert found["gpus"] == []
    assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH to cuInit" in found["reason"]


@pytest.mark.parametrize(
    ("settings", "found", "devices"),
    [
        ({"gpus": 2}, TWO, ["cuda:0", "cuda:1"]),
        ({"gpus": 1}, TWO, ["cuda:0"]),
        ({"devices": ["cuda:1", "cpu"]}, TWO, ["cuda:1", "cpu"]),
        ({"devices": ["cpu", "cpu"]}, NONE, ["cpu", "cpu"]),
        ({"stages": 2}, NONE, ["cpu", "cpu"]),
        ({"stages": 2}, TWO, ["cuda:0", "cuda:1"]),
        ({}, TWO, ["cuda:0", "cuda:1"]),
        ({}, NONE, ["cpu"]),
    ],
)
def test_choose_devices(settings, found, devices):
    assert choose_devices(load_settings(**settings), found) == devices


@pytest.mark.parametrize(
    ("settings", "found", "parts"),
    [
        ({"gpus": 4}, NONE, ["gpus", "GPUs seen, 0 (no CUDA driver is installed), got 4"]),
        ({"gpus": 3}, TWO, ["gpus", "GPUs seen, 2, got 3"]),
        ({"devices": ["cuda:2"]}, TWO, ["devices", "GPUs seen, 2, got cuda:2"]),
        ({"stages": 3}, TWO, ["stages", "GPUs seen, 2, got 3"]),
    ],
)
def test_more_gpus_than_visible_are_refused(settings, found, parts):
    with pytest.raises(ValueError) as caught:
        choose_devices(load_settings(**settings), found)
    for part in [*parts, "--device cpu"]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "devices", "hosts", "expected"),
    [
        ({}, ["cuda:0", "cuda:1"], None, True),
        ({"backend": "nccl"}, ["cuda:0", "cuda:1"], None, True),
        ({"backend": "gloo"}, ["cuda:0", "cuda:1"], None, False),
        ({"backend": "gloo"}, ["cuda:0", "cuda:0"], None, False),
        ({"in_process": True}, ["cuda:0", "cuda:0"], None, False),
        ({}, ["cuda:0", "cuda:0"], ["a", "b"], True),
        ({}, ["cuda:0", "cpu"], None, False),
        ({}, ["cuda:0"], None, False),
    ],
)
def test_connects_over_nccl(settings, devices, hosts, expected):
    assert connects_over_nccl(load_settings(**settings), devices, hosts) is expected


@pytest.mark.parametrize(
    ("settings", "devices", "hosts", "said"),
    [
        (
            {},
            ["cuda:0", "cuda:1", "cuda:0"],
            None,
            "each GPU once where NCCL connects the stages, got cuda:0 for 2 stages",
        ),
        ({"backend": "nccl"}, ["cuda:1", "cuda:1"], ["a", "a"], "got cuda:1 for 2 stages"),
        ({"backend": "nccl"}, ["cuda:0", "cpu"], None, "gloo where a stage is on the CPU"),
        ({"backend": "nccl"}, ["cpu"], None, "gloo where a stage is on the CPU"),
    ],
)
def test_nccl_is_refused_where_it_would_fail(settings, devices, hosts, said):
    with pytest.raises(ValueError, match=said) as caught:
        connects_over_nccl(load_settings(**settings), devices, hosts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("launched", "visible", "owners"),
    [
        (None, "0", None),
        (Launched(1, 2, 1), None, None),
        (Launched(1, 2, 1), "0,1", None),
        (Launched(1, 2, 1), "3", ["rank-0", "rank-1"]),
    ],
)
def test_ranks_that_each_see_one_gpu_may_all_call_it_cuda_0(monkeypatch, launched, visible, owners):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpu_owners(launched, 2) == owners
    if owners:
        assert connects_over_nccl(load_settings(), ["cuda:0", "cuda:0"], owners)


def test_backend_is_refused_with_in_process():
    with pytest.raises(ValueError, match="backend must be left out with in_process, got gloo"):
        load_settings(in_process=True, backend="gloo")
