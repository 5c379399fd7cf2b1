"""configs/: the deployments that name GPUs fit the memory they name, by our own count of bytes."""

from pathlib import Path

import pytest
from transformers import BloomConfig

from dist_int8.config import load_settings
from dist_int8.models import describe, load_config
from dist_int8.partition.from_settings import PlanRequest, answer

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPES = {
    "bloom-176b": "bloom-176b",
    "bloom-3b": "bloom-3b",
    "opt-66b": "opt-66b",
}
DEPLOYMENTS = {
    path.name: next(shape for name, shape in SHAPES.items() if path.name.startswith(name + "-"))
    for path in sorted(CONFIGS.glob("*.yaml"))
    if not path.name.startswith("cpu-")
}


def plan(name, **changes):
    settings = load_settings(CONFIGS / name, **changes)
    config = load_config(CONFIGS / "models" / DEPLOYMENTS[name])
    return answer(settings, PlanRequest(like_load=True), config, describe(config), "test")


def test_the_deployments_of_the_int8_blog_are_there():
    machines = ("3xa100-80gb", "4xa100-80gb", "8xa100-80gb", "5xa100-40gb", "8xa100-40gb")
    assert {f"bloom-176b-{machine}.yaml" for machine in machines} <= DEPLOYMENTS.keys()
    assert "bloom-3b-1xt4.yaml" in DEPLOYMENTS


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_what_a_file_reserves_fits(name):
    found = plan(name)
    assert found.fits, found.refusal()
    count = int(name.split("-")[2].split("x")[0])
    assert len(found.stages) == count
    size = name.rsplit("-", 1)[1].removesuffix(".yaml")
    budgets = {stage.budget for stage in found.stages}
    assert budgets == {int(size.removesuffix("gb")) * 10**9 if "gb" in size else 16 * 10**9}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_16_bits_do_not_fit_there(name):
    found = plan(name, int8=False)
    assert not found.fits
    assert "keep the linear layers in int8 (int8: true)" in found.suggestions


def test_shapes_are_what_transformers_reads():
    ours = describe(load_config(CONFIGS / "models" / "bloom-176b"))
    theirs = BloomConfig(vocab_size=250880, hidden_size=14336, n_layer=70, n_head=112)
    assert ours == describe(theirs)
