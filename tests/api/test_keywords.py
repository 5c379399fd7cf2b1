"""The types of `Model.generate` say what the settings accept and what comes back."""

from typing import Literal, get_overloads, get_type_hints

import pytest

from dist_int8.api.keywords import GenerationKeywords
from dist_int8.api.model import Model, TokenStream
from dist_int8.config import GenerationSettings
from dist_int8.engine import Completion


def test_keywords_are_the_fields_of_the_settings():
    fields = {
        name: hint
        for name, hint in get_type_hints(GenerationSettings).items()
        if name in GenerationSettings.model_fields
    }
    keywords = get_type_hints(GenerationKeywords)
    assert keywords.pop("stop") == str | fields.pop("stop") | tuple[str, ...] | None
    assert keywords == {name: hint | None for name, hint in fields.items()}


@pytest.mark.parametrize("stop", ["end", ["end"], ("end",)])
def test_stop_may_be_text_a_list_or_a_tuple(stop):
    assert GenerationSettings.from_generation_config(None, {"stop": stop}).stop == ["end"]


def test_generate_returns_completions_or_a_stream():
    returned = {
        hints["stream"]: hints["return"]
        for hints in map(get_type_hints, get_overloads(Model.generate))
    }
    assert returned == {Literal[False]: list[Completion], Literal[True]: TokenStream}
