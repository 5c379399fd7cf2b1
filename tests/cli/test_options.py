"""Flags are the fields of the settings: names, help, values, and the page that lists them."""

import inspect
import os
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer

from dist_int8.cli.app import app
from dist_int8.cli.options import (
    Given,
    config_flag,
    device_flag,
    log_flags,
    option,
    setting_flag,
    settings_flags,
    takes,
)
from dist_int8.config import GenerationSettings, Settings

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Own:
    name: Annotated[str, option("Own", "A name.")] = "nobody"


def parse(flags, *arguments):
    """What a command with these flags is given."""
    seen = []

    @takes(Own, flags)
    def command(options, given):
        """A command."""
        seen.append((options, given))

    small = typer.Typer(add_completion=False)
    small.command()(command)
    assert small(args=list(arguments), standalone_mode=False) is None
    return seen[0]


def test_only_what_was_given_is_handed_on():
    flags = [config_flag("A"), device_flag("A"), *settings_flags("A", "stages", "seed", "int8")]
    assert parse(flags) == (Own(), Given())
    options, given = parse(flags, "--name", "x", "--stages", "2", "--seed", "0", "--no-int8")
    assert options == Own("x")
    assert given.settings == {"stages": 2, "int8": False} and given.generation == {"seed": 0}
    _, given = parse(flags, "--config", "a.yaml", "--device", "cpu")
    assert (given.config, given.device) == (Path("a.yaml"), "cpu")


def test_lists_are_split_at_commas_or_repeated():
    flags = settings_flags("A", "devices", "hosts", "stop")
    _, given = parse(flags, "--devices", "cpu,cpu", "--hosts", "a", "--stop", "x,y", "--stop", "z")
    assert given.settings == {"devices": ["cpu", "cpu"], "hosts": ["a"]}
    assert given.generation == {"stop": ["x,y", "z"]}


def test_a_command_may_take_text_for_a_field():
    _, given = parse([setting_flag("A", "memory", kind=str)], "--memory", "79GiB")
    assert given.settings == {"memory": "79GiB"}


@pytest.mark.parametrize(("text", "stages"), [("4", 4), ("17,18", [17, 18]), ("auto", "auto")])
def test_stages_are_a_number_or_the_blocks_of_each(text, stages):
    _, given = parse(settings_flags("A", "stages"), "--stages", text)
    assert given.settings == {"stages": stages}


def test_blocks_of_each_stage_on_the_cpu():
    flags = [device_flag("A"), *settings_flags("A", "stages", "model")]
    _, given = parse(flags, "--device", "cpu", "--stages", "10,20", "--model", "m")
    settings = given.load_settings("test")
    assert settings.stages == [10, 20] and settings.devices == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "verbosity"),
    [([], None), (["-q"], -1), (["-v"], 1), (["-vv"], 2)],
)
def test_verbosity(monkeypatch, arguments, verbosity):
    configured = []
    monkeypatch.setattr("dist_int8.launcher.logs.configure", configured.append)
    parse(log_flags("A"), *arguments)
    assert configured == [verbosity]


def test_settings_of_file_and_flags(tmp_path):
    (tmp_path / "s.yaml").write_text("model: a\ndevices: [cpu, cpu, cpu]\nkv: int8\n")
    given = Given({"model": "b"}, config=tmp_path / "s.yaml", device="cpu")
    settings = given.load_settings("here")
    assert (settings.model, settings.num_stages, settings.kv) == ("b", None, "int8")
    assert settings.devices == ["cpu"] * 3
    with pytest.raises(ValueError, match="here:kv: kv must be"):
        Given({"kv": "4bit"}).load_settings("here")


def test_every_flag_of_a_setting_has_its_sentence():
    fields = Settings.model_fields | GenerationSettings.model_fields
    for key, field in fields.items():
        parameter = setting_flag("A", key)
        help_text = parameter.annotation.__metadata__[0].help
        assert parameter.name == key and parameter.default is None
        assert help_text.startswith(field.description)
        if isinstance(field.default, str | float):
            assert "(default: " in help_text or field.default is False, key


def test_commands_take_few_parameters():
    for command in app.registered_commands:
        function = inspect.unwrap(command.callback)
        assert len(inspect.signature(function, follow_wrapped=False).parameters) <= 3


def test_the_page_of_commands_is_true():
    page = runpy.run_path(str(ROOT / "docs/cli.py"))["make_page"]()
    assert (ROOT / "docs/cli.md").read_text() == page, "run python docs/cli.py"


def test_the_log_level_comes_from_flags_or_the_environment(monkeypatch):
    import logging

    from dist_int8.launcher import logs

    logger = logging.getLogger("dist_int8")
    before = logger.level
    try:
        monkeypatch.setenv("DIST_INT8_LOG", "info")
        logs.configure()
        assert logger.level == logging.INFO
        logs.configure(2)
        assert logger.level == logging.DEBUG and os.environ["DIST_INT8_LOG"].lower() == "debug"
    finally:
        logger.setLevel(before)
