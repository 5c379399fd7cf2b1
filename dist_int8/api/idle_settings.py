"""Settings that were given and change nothing here, said in one line of the log.

One file of settings serves many deployments, so most of them are no mistake: a number of recoveries
without `recover`, or how stages talk where there is only one. What contradicts another setting is
refused where it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dist_int8.config import Settings

_OF_SEVERAL_STAGES = ("backend", "interface", "rendezvous_timeout", "recover", "in_process")
_NUMERICS = ("accuracy", "rotation", "outlier_rule", "outlier_threshold")
_OF_INT8 = (*_NUMERICS, "calibrate", "num_hot_columns", "skip_modules")
_STORED = ("skip_modules", "head", "embedding", "calibrate", "num_hot_columns", "rotation")
_OF_THE_POINT = {"rotation", "outlier_rule", "num_hot_columns"}  # all that one decides
_OF_THE_CUT = ("objective", "prefill_ratio")


@dataclass(frozen=True)
class Facts:
    """What decides whether a setting has an effect.

    Attributes:
        num_stages: number of stages.
        devices: device of every stage.
        is_folder: whether the model is a local folder.
        launched: whether a launcher started the ranks.
        used: the settings with what an int8 checkpoint has decided.
    """

    num_stages: int
    devices: tuple[str, ...]
    is_folder: bool
    launched: bool
    used: Settings


def find_idle(settings: Settings, facts: Facts) -> dict[str, str]:
    """Finds the settings that differ from their defaults and change nothing, each with the cause.

    Args:
        settings: as they were given, before an int8 checkpoint decides some of them.
        facts: of the model and of this run.
    """
    default = Settings()
    return {
        key: reason
        for key, reason in _list_reasons(settings, facts)
        if getattr(settings, key) != getattr(default, key)
    }


def _list_reasons(settings: Settings, facts: Facts) -> Iterator[tuple[str, str]]:
    """Yields every setting without effect, whether it was given or not."""
    if facts.is_folder:
        yield "revision", "the model is a folder"
    if facts.num_stages == 1:
        yield from ((key, "there is one stage") for key in (*_OF_SEVERAL_STAGES, *_OF_THE_CUT))
    elif settings.in_process:
        same = ("interface", "rendezvous_timeout")
        yield from ((key, "all stages run in this process") for key in same)
    if settings.pinned is not None:
        yield from ((key, "`stages` lists the blocks") for key in _OF_THE_CUT)
    if settings.objective != "throughput":
        yield "prefill_ratio", f"the objective is {settings.objective}"
    if not (settings.recover and facts.num_stages > 1):
        yield "max_recoveries", "no stage is restarted"
    if settings.hosts is not None and not facts.launched:
        yield "hosts", "no launcher spreads the stages"
    if settings.memory is None and all(device == "cpu" for device in facts.devices):
        yield "reserve", "no `memory` is given for the CPU"
    if all(device == "cpu" for device in facts.devices):
        yield "cuda_graphs", "no stage is on a GPU"
    if isinstance(settings.memory, dict) and not set(settings.memory) <= set(facts.devices):
        unused = ", ".join(sorted(set(settings.memory) - set(facts.devices)))
        yield "memory", f"no stage is on {unused}"
    yield from _list_numerics(settings, facts)


def _list_numerics(settings: Settings, facts: Facts) -> Iterator[tuple[str, str]]:
    if not settings.int8:
        yield from ((key, "int8 is false") for key in _OF_INT8)
        return
    for key in _STORED:
        if getattr(facts.used, key) != getattr(settings, key):
            yield key, "the int8 checkpoint brings its own"
    if settings.calibrate == "off":
        yield "num_hot_columns", "calibrate is off"
    elif facts.used.numerics.num_hot_columns == 0:
        yield "calibrate", "num_hot_columns is 0"
    if settings.outlier_rule in ("none", "all"):
        yield "outlier_threshold", f"outlier_rule is {settings.outlier_rule}"
    if settings.model_dump(exclude_none=True).keys() >= _OF_THE_POINT:
        yield "accuracy", "rotation, outlier_rule and num_hot_columns are given beside it"


def describe_idle(idle: dict[str, str]) -> str:
    """Describes what `find_idle` found as one line."""
    listed = ", ".join(f"{key} ({reason})" for key, reason in idle.items())
    return f"settings without effect here: {listed}"
