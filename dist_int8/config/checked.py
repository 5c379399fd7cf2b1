"""The base of every settings class: strict types, no unknown keys, errors of one line.

`<file or call>:<key>: <key> must be <expected>, got <actual>; <what to change>`.
"""

import difflib
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

NonEmpty = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
_FEW = 15  # names that an error may list


def expand_home(value: object) -> object:
    """Turns a path into text, with the home folder for ~; other types are left to be refused."""
    return os.path.expanduser(str(value)) if isinstance(value, str | Path) else value


PathText = Annotated[NonEmpty, BeforeValidator(expand_home)]


def listed(value: object) -> object:
    """Turns one string into a list of one, and a tuple into a list."""
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, tuple) else value


class Checked(BaseModel):
    """A frozen model with strict types, no unknown keys and, by `from_values`, one-line errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    @classmethod
    def from_values(
        cls, values: Mapping[str, Any], source: str, flags: Mapping[str, str] | None = None
    ) -> Self:
        """Validates `values`; a mistake is a one-line ValueError that begins with `source`.

        Args:
            values: by name of the field; None is the default, as if it were left out.
            source: file or call that the values come from.
            flags: spelling on the command line of the fields that were given there.
        """
        for key in values:
            if not isinstance(key, str):
                raise ValueError(
                    f"{source}:{show(key)}: a key must be the name of a setting, got {show(key)}; "
                    f"{_list_names(cls)}"
                )
        given = {k: v for k, v in values.items() if v is not None or k not in cls.model_fields}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            lines = [_one_line(cls, source, detail, flags or {}) for detail in error.errors()]
            raise ValueError(" | ".join(dict.fromkeys(lines))) from None

    @classmethod
    def explain_missing(cls, hint: str) -> str:
        """Says what to do about a field that is missing; `hint` shows how it is written."""
        return hint

    @classmethod
    def explain_unknown(cls, key: str) -> str | None:
        """Says where a key belongs that is no field of this class; None if nowhere."""
        return None


def show(value: object) -> str:
    """Shows a wrong value in at most 80 characters, however large or nested it is."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        text = "a number with thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 3, 80, 80, 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


def _one_line(cls: type[Checked], source: str, detail: Any, flags: Mapping[str, str]) -> str:
    """Words a pydantic error as one line of ours."""
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:  # about several fields; it names the one to change
        key, _, rest = message.partition(": ")
        if key in flags and rest.startswith(f"{key} "):
            return f"{source}:{key}: {flags[key]}{rest.removeprefix(key)}"
        return f"{source}:{message}"
    key = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else _list_names(cls)
        hint = cls.explain_unknown(key) or hint
        return f"{source}:{key}: {key} must be a known setting, got an unknown key; {hint}"
    examples = cls.model_fields[key].examples
    assert examples, f"{cls.__name__}.{key} has no example"
    name = flags.get(key, key)
    hint = f"write it like `{_write(key, examples[0], flags)}`"
    if detail["type"] == "value_error":
        said, _, advice = message.rpartition("; ")
        if key in flags and ("[" in advice or "{" in advice):  # how YAML writes it
            message = f"{said}; {hint}"
        return f"{source}:{key}: {name} {message}"
    if detail["type"] == "missing":
        return f"{source}:{key}: {name} must be given, it is missing; {cls.explain_missing(hint)}"
    return (
        f"{source}:{key}: {name} must be {_expected(detail)}, got {show(detail['input'])}; {hint}"
    )


def _list_names(cls: type[Checked]) -> str:
    if len(cls.model_fields) <= _FEW:
        return f"known: {', '.join(cls.model_fields)}"
    return "docs/settings.md lists all settings"


def _write(key: str, example: Any, flags: Mapping[str, str]) -> str:
    """Writes an example as a line of YAML, or as a flag if that is how the value was given."""
    if key not in flags:
        return f"{key}: {example}"
    if isinstance(example, bool):
        return flags[key]
    values = example if isinstance(example, list) else [example]
    return f"{flags[key]} {','.join(map(str, values))}"


def _expected(detail: Any) -> str:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "greater_than":
            return f"above {context['gt']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case "less_than":
            return f"below {context['lt']}"
        case "literal_error":
            return str(context["expected"])
        case "too_short" | "string_too_short":
            return "non-empty"
        case "finite_number":
            return "a finite number"
        case "int_type" | "int_from_float":
            return "an integer"
        case "float_type":
            return "a number"
        case "string_type":
            return "text"
        case "bool_type":
            return "true or false"
        case "list_type":
            return "a list"
    return str(detail["msg"]).removeprefix("Input should be ")
