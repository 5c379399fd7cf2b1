"""The base of every settings class: strict types, no unknown keys, errors of one line.

`<file or call>:<key>: <key> must be <expected>, got <actual>; <what to change>`.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

NonEmpty = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


def listed(value: object) -> object:
    """Turns one string into a list of one, and a tuple into a list."""
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, tuple) else value


class Checked(BaseModel):
    """A frozen model with strict types, no unknown keys and, by `from_values`, one-line errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], source: str) -> Self:
        """Validates `values`; a mistake is a one-line ValueError that begins with `source`."""
        for key in values:
            if not isinstance(key, str):
                raise ValueError(
                    f"{source}:{key}: a key must be the name of a setting, got {key!r}; known: "
                    f"{', '.join(cls.model_fields)}"
                )
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            lines = [_one_line(cls, source, detail) for detail in error.errors()]
            raise ValueError(" | ".join(dict.fromkeys(lines))) from None


def _one_line(cls: type[BaseModel], source: str, detail: Any) -> str:
    """Words a pydantic error as one line of ours."""
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return f"{source}:{message}"
    key = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(cls.model_fields)}"
        return f"{source}:{key}: {key} must be a known setting, got an unknown key; {hint}"
    if detail["type"] == "value_error":
        return f"{source}:{key}: {key} {message}"
    example = cls.model_fields[key].examples
    assert example, f"{cls.__name__}.{key} has no example"
    expected = _expected(detail)
    return (
        f"{source}:{key}: {key} must be {expected}, got {_shown(detail['input'])}; "
        f"write it like `{key}: {example[0]}`"
    )


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


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
