"""The flags of the commands, generated from the fields of the settings where they stand for one.

A command is a function of two arguments: a dataclass of its own options, whose fields are annotated
with `option`, and `Given`, what was given for the settings. `takes` turns it into the function with
one parameter per flag that typer reads:

    @takes(PlanOptions, settings_flags("Where it runs", "gpus", "devices"))
    def plan(options: PlanOptions, given: Given) -> None: ...
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from dist_int8.cli.escapes import read_escapes
from dist_int8.cli.layout import choose_layout
from dist_int8.config import GenerationSettings, Settings, load_settings

Own = TypeVar("Own")
Flags = list[inspect.Parameter]

# Flags that are not spelled like their field. They are the same in every command.
_SPELLINGS = {
    "model": ("--model", "-m"),
    "random_weights": ("--random-weights/--stored-weights",),
    "threads_per_stage": ("--threads",),
    "skip_modules": ("--skip",),
    "max_new_tokens": ("--max-new-tokens", "-n"),
}
# What is so on a command line alone, after the sentence of the setting.
_ON_A_COMMAND_LINE = {"stop": r" \n, \t, \r and \uXXXX are read as in JSON, and \\ is a backslash."}
_REPEATED = ("skip_modules", "stop")  # one value per flag; other lists are split at commas


@dataclass(frozen=True)
class Given:
    """What was given on the command line, apart from the options of the command.

    Attributes:
        settings: values by field of `Settings`.
        generation: values by field of `GenerationSettings`.
        config: YAML file of settings.
        device: cpu or cuda, for all stages.
        quiet: show no progress, and log errors only.
        verbose: number of times that more of the log was asked for.
        flags: spelling, on the command line, of each setting that was given.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None
    device: str | None = None
    quiet: bool = False
    verbose: int = 0
    flags: dict[str, str] = field(default_factory=dict, compare=False)

    def load_settings(self, source: str) -> Settings:
        """Reads the settings of the file with the flags laid over it; `source` begins its errors.

        Raises:
            ValueError: a wrong value, or flags that contradict each other.
        """
        layout = choose_layout(source, self.config, self.device, self.settings)
        values = {**self.settings, **layout}
        return load_settings(self.config, source=source, flags=self.flags, **values)

    def check_generation(self, source: str) -> GenerationSettings:
        """Checks the flags of a generation; `source` begins the errors.

        Raises:
            ValueError: a wrong value.
        """
        return GenerationSettings.from_values(self.generation, source, self.flags)

    @property
    def verbosity(self) -> int | None:
        """As `logs.configure` takes it; None: the environment decides."""
        return -1 if self.quiet else self.verbose or None


def option(panel: str | None, text: str, *names: str, **more: Any) -> Any:
    """Describes an option, as the annotation of a field or parameter.

    Args:
        panel: heading under which --help shows it; None: the general one.
        text: what --help says, the default included.
        names: spelling, as in "--prompt", "-p"; by default that of the field.
        more: as of `typer.Option`.
    """
    return typer.Option(*names, help=text, rich_help_panel=panel, **{"show_default": False, **more})


def settings_flags(panel: str | None, *keys: str) -> Flags:
    """Makes the flags of several fields of the settings, or of the settings of a generation."""
    return [setting_flag(panel, key) for key in keys]


def setting_flag(
    panel: str | None, key: str, *names: str, text: str | None = None, kind: Any = None
) -> inspect.Parameter:
    """Makes the flag of one field of the settings. Without it on the command line, it is None.

    Args:
        panel: heading under which --help shows it.
        key: name of the field.
        names: spelling; by default the one of the field in every command.
        text: what --help says; by default the sentence of the field, and its default.
        kind: type of the value; by default as the field's.
    """
    info = option(panel, text or _describe(key), *(names or _SPELLINGS.get(key, ())))
    if kind is None:
        kind = _choose_type(key, _field_type(key))
    return _make_parameter(key, kind | None, info, None)


def config_flag(panel: str) -> inspect.Parameter:
    """Makes --config."""
    text = "YAML file of settings; flags win over it. See configs/."
    return _make_parameter("config", Path | None, option(panel, text), None)


def device_flag(panel: str) -> inspect.Parameter:
    """Makes --device, a shorthand for the layout."""
    text = "cpu or cuda: every stage on the CPU, or one stage per GPU."
    return _make_parameter("device", str | None, option(panel, text), None)


def log_flags(panel: str | None, quiet: str = "Show no progress on stderr.") -> Flags:
    """Makes --quiet and --verbose; `quiet` is the help of the former."""
    info = option(panel, quiet, "--quiet", "-q")
    return [_make_parameter("quiet", bool, info, False), verbose_flag(panel)]


def verbose_flag(panel: str | None) -> inspect.Parameter:
    """Makes --verbose alone."""
    text = "Log more on stderr: -v information, -vv debugging. (default: $DIST_INT8_LOG or warning)"
    return _make_parameter(
        "verbose", int, option(panel, text, "--verbose", "-v", count=True, metavar=""), 0
    )


def takes(
    own: type[Own], flags: Iterable[inspect.Parameter] = (), panels: Sequence[str] = ()
) -> Callable[[Callable[[Own, Given], None]], Callable[..., None]]:
    """Turns a function of `own` options and `Given` into one with a parameter per flag.

    Args:
        own: dataclass of the options that belong to this command.
        flags: flags of the settings.
        panels: headings of --help in their order; by default that of the flags.
    """
    parameters = [*_read_parameters(own), *flags]
    if panels:
        parameters.sort(key=lambda parameter: panels.index(_panel(parameter)))
    spellings = {parameter.name: _spell(parameter) for parameter in parameters}

    def decorate(function: Callable[[Own, Given], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            values = {name: _expand(value) for name, value in values.items()}
            mine = {f.name: values.pop(f.name) for f in dataclasses.fields(own)}  # type: ignore[arg-type]
            given = _sort_values(values, spellings)
            if "verbose" in values:
                from dist_int8.launcher import logs

                logs.configure(given.verbosity)
            function(own(**mine), given)

        typed: Any = command
        typed.__signature__ = inspect.Signature(parameters)
        typed.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _sort_values(values: dict[str, Any], spellings: Mapping[str, str]) -> Given:
    """Sorts the values of flags by what they stand for; None was not given."""
    chosen = {key: value for key, value in values.items() if value is not None}
    if chosen.get("quiet") and chosen.get("verbose"):
        raise ValueError("dist-int8: --quiet must be left out with --verbose, got both; keep one")
    if "stop" in chosen:
        chosen["stop"] = [read_escapes(text, "dist-int8: --stop") for text in chosen["stop"]]
    return Given(
        settings={k: _split(k, v) for k, v in chosen.items() if k in Settings.model_fields},
        generation={k: v for k, v in chosen.items() if k in GenerationSettings.model_fields},
        flags={key: spellings[key] for key in chosen},
        **{
            name: chosen[name]
            for name in ("config", "device", "quiet", "verbose")
            if name in chosen
        },
    )


def _expand(value: Any) -> Any:
    """Replaces ~ in a path by the home folder: a shell does not after `=` or in quotes."""
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _spell(parameter: inspect.Parameter) -> str:
    """Returns the flag of a parameter, the longest spelling and without its opposite."""
    info = parameter.annotation.__metadata__[0]
    declared = [info.default, *(info.param_decls or ())]  # typer takes the first for a default
    names = [str(name).split("/")[0] for name in declared if str(name).startswith("-")]
    return max(names, key=len, default=f"--{parameter.name.replace('_', '-')}")


def _split(key: str, value: Any) -> Any:
    if key == "stages" and isinstance(value, str):
        return _parse_counts(value)
    is_list = get_origin(_first_type(_field_type(key))) is list
    return value.split(",") if is_list and isinstance(value, str) else value


def _parse_counts(text: str) -> Any:
    """Reads "4" or "17,18,18,17"; anything else is left to the settings, which refuse it."""
    try:
        counts = [int(count) for count in text.split(",")]
    except ValueError:
        return text
    return counts if len(counts) > 1 else counts[0]


def _field_type(key: str) -> Any:
    return _find_field(key).annotation


def _find_field(key: str) -> Any:
    return (Settings.model_fields | GenerationSettings.model_fields)[key]


def _describe(key: str) -> str:
    """The sentence of a setting and its default: one text, written once."""
    default, text = _find_field(key).default, str(_find_field(key).description)
    text += _ON_A_COMMAND_LINE.get(key, "")
    if default is None or default is False or default == []:
        return text
    if default is True:
        default = f"--{key.replace('_', '-')}"
    return f"{text} (default: {', '.join(default) if isinstance(default, list) else default})"


def _choose_type(key: str, annotation: Any) -> Any:
    """The type of a flag: the first of a union's, text for choices and for lists at commas."""
    kind = _first_type(annotation)
    if get_origin(kind) is list:
        return list[str] if key in _REPEATED else str
    return str if get_origin(kind) is Literal or key == "stages" else kind


def _first_type(annotation: Any) -> Any:
    while get_origin(annotation) in (Annotated, Union, UnionType):
        annotation = get_args(annotation)[0]
    return annotation


def _read_parameters(own: type[Any]) -> Flags:
    hints = get_type_hints(own, include_extras=True)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in dataclasses.fields(own)
    ]


def _make_parameter(name: str, kind: Any, info: Any, default: Any) -> inspect.Parameter:
    annotation = Annotated[kind, info]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _panel(parameter: inspect.Parameter) -> str:
    return str(parameter.annotation.__metadata__[0].rich_help_panel)
