"""The types of `Model.generate` say what the settings accept and what comes back."""

from typing import Literal, get_args, get_overloads, get_type_hints

import pytest

from dist_int8.api.keywords import GenerationKeywords
from dist_int8.api.model import Model, TokenStream
from dist_int8.config import GenerationSettings
from dist_int8.engine import Completion

LISTS = ("stop", "stop_token_ids", "eos_token_id", "suppress_tokens", "begin_suppress_tokens")
LISTS += ("forced_eos_token_id",)


def test_keywords_are_the_fields_of_the_settings():
    fields = {
        name: hint
        for name, hint in get_type_hints(GenerationSettings).items()
        if name in GenerationSettings.model_fields
    }
    keywords = get_type_hints(GenerationKeywords)
    assert set(keywords) == set(fields)
    for name, hint in fields.items():  # each takes what the field holds, or None; some take more
        keyword = set(get_args(keywords[name]))
        assert set(get_args(hint | None)) <= keyword or name == "sequence_bias", name
        assert keywords[name] == hint | None or name in (*LISTS, "sequence_bias"), name
    for name in LISTS:
        item = str if name == "stop" else int
        assert keywords[name] == item | list[item] | tuple[item, ...] | None, name


@pytest.mark.parametrize("stop", ["end", ["end"], ("end",)])
def test_stop_may_be_text_a_list_or_a_tuple(stop):
    assert GenerationSettings.from_generation_config(None, {"stop": stop}).stop == ["end"]


def test_generate_returns_completions_or_a_stream():
    returned = {
        hints["stream"]: hints["return"]
        for hints in map(get_type_hints, get_overloads(Model.generate))
    }
    assert returned == {Literal[False]: list[Completion], Literal[True]: TokenStream}
