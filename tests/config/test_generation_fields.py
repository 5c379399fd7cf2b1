"""Every field of transformers' GenerationConfig is honoured, without effect, or refused by name."""

import logging

import pytest
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

from dist_int8.config import GenerationSettings
from dist_int8.config.generation_fields import (
    HONOURED,
    NO_EFFECT,
    REFUSED,
    read_fields,
    read_model_defaults,
)

FIELDS = sorted(vars(GenerationConfig()))
# A value of each field that is not its default. A new field of transformers needs one here.
VALUES = {
    name: GenerationSettings.model_fields[ours].examples[0] for name, ours in HONOURED.items()
}
VALUES |= {
    "max_new_tokens": 9,
    "sequence_bias": {(5,): -1.0, (6, 7): 2.0},
    "num_beams": 4,
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "num_return_sequences": 2,
    "guidance_scale": 1.5,
    "token_healing": True,
    "watermarking_config": WatermarkingConfig(),
    "encoder_repetition_penalty": 1.1,
    "encoder_no_repeat_ngram_size": 2,
    "cache_implementation": "quantized",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 4,
    "speculation_type": "x",
    "compile_config": CompileConfig(),
}


def config_of(name, value) -> GenerationConfig:
    """A config with one field set, without transformers' own checks of what goes together."""
    config = GenerationConfig()
    setattr(config, name, value)
    return config


def test_the_tables_have_every_field_once():
    tables = [set(HONOURED), set(NO_EFFECT), set(REFUSED)]
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert set.union(*tables) == set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_honoured_without_effect_or_refused_by_name(name):
    value = VALUES.get(name, True)
    read = GenerationSettings.from_generation_config
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"generation_config:{name}: {name} must be left out"):
            read(config_of(name, value), {})
        for harmless in (None, *REFUSED[name][0]):
            assert read(config_of(name, harmless), {}) == GenerationSettings()
    elif name in NO_EFFECT:
        assert read(config_of(name, value), {}) == GenerationSettings()
    else:
        ours = HONOURED[name]
        got = getattr(read(config_of(name, value), {}), ours)
        assert got == getattr(GenerationSettings.from_values({ours: value}, "x"), ours)
        assert got != GenerationSettings.model_fields[ours].default


def test_a_field_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="generation_config:new_thing: new_thing must be left out"):
        read_fields(GenerationConfig(new_thing=3), "generation_config")
    assert read_fields(GenerationConfig(new_thing=None), "generation_config") == {}


@pytest.mark.parametrize("given", [{"temperature": 1.0}, "greedy", 5])
def test_what_is_no_generation_config_is_refused_by_type(given):
    with pytest.raises(
        ValueError, match=f"GenerationConfig of transformers.*{type(given).__name__}"
    ):
        GenerationSettings.from_generation_config(given, {})


def test_a_models_own_config_passes_over_what_transformers_does_not_know(caplog):
    caplog.set_level(logging.INFO)
    given = GenerationConfig(do_sample=True, top_p=0.8, chat_format="chatml", pad_token_id=0)
    values, refusal = read_model_defaults(given, "g.json")
    assert values == {"do_sample": True, "top_p": 0.8} and refusal == ""
    assert "g.json:chat_format: passed over" in caplog.text
    _, refusal = read_model_defaults(GenerationConfig(num_beams=4), "g.json")
    assert refusal.startswith("g.json:num_beams: num_beams must be left out, got 4; only greedy")
    assert refusal.endswith("or give model_defaults=False")


SAMPLES = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("defaults", "config", "overrides", "expected"),
    [
        (SAMPLES, {}, {}, (True, 0.6, 0.9, 50)),  # transformers' own top_k, as it would take
        (SAMPLES | {"top_k": 0}, {}, {}, (True, 0.6, 0.9, 0)),
        (SAMPLES, {}, {"temperature": 0}, (False, 1.0, 0.9, 50)),
        (SAMPLES, {}, {"do_sample": False}, (False, 0.6, 0.9, None)),
        (SAMPLES, {}, {"top_p": 0.5, "top_k": 7}, (True, 0.6, 0.5, 7)),
        (SAMPLES, {"temperature": 0.3}, {}, (True, 0.3, 0.9, 50)),
        (SAMPLES, {"do_sample": False}, {}, (False, 0.6, 0.9, None)),
        (SAMPLES, {}, {"model_defaults": False}, (False, 1.0, None, None)),
        ({"temperature": 0.6}, {}, {}, (False, 0.6, None, None)),  # like transformers: not asked to
        ({"temperature": 0.6}, {}, {"do_sample": True}, (True, 0.6, None, None)),
        ({"temperature": 0.6}, {}, {"temperature": 0.8}, (True, 0.8, None, None)),
        ({}, {"temperature": 0.6}, {}, (False, 0.6, None, None)),
        ({}, {}, {"temperature": 0.8}, (True, 0.8, None, None)),
    ],
)
def test_arguments_win_over_the_config_and_that_over_the_models(
    defaults, config, overrides, expected
):
    got = GenerationSettings.from_generation_config(
        GenerationConfig(**config) if config else None, overrides, defaults
    )
    assert (got.sampling, got.sampling_temperature, got.top_p, got.top_k) == expected
    assert got == got.over(defaults)  # completing what is complete changes nothing


@pytest.mark.parametrize(
    ("defaults", "overrides", "expected"),
    [
        ({"max_new_tokens": 5}, {"max_length": 12}, (5, None)),
        ({"min_new_tokens": 9}, {"max_new_tokens": 3}, (3, 3)),
        ({"max_new_tokens": 3}, {"min_new_tokens": 9}, (3, 3)),
        ({"min_new_tokens": 2}, {"max_new_tokens": 3}, (3, 2)),
    ],
)
def test_lengths_from_several_places_are_settled_as_in_transformers(
    defaults, overrides, expected, caplog
):
    got = GenerationSettings.from_generation_config(None, overrides, defaults)
    assert (got.count_new_tokens(2), got.min_new_tokens) == expected
    assert bool(caplog.records) == (expected != (3, 2))


def test_lengths_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"min_new_tokens must be at most max_new_tokens \(3\)"):
        GenerationSettings.from_generation_config(None, {"min_new_tokens": 9, "max_new_tokens": 3})
    config = GenerationConfig(min_new_tokens=9, max_new_tokens=3)  # of which transformers warns
    assert GenerationSettings.from_generation_config(config, {}).min_new_tokens == 3


def test_sampling_settings_without_sampling_are_warned_of(caplog):
    GenerationSettings.from_generation_config(None, {"top_p": 0.9, "top_k": 0})
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["top_p"]
    GenerationSettings.from_generation_config(None, {"top_p": 0.9, "temperature": 0.5})
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 64),
        ({"max_new_tokens": 9}, 9),
        ({"max_length": 15}, 5),
        ({"max_length": 15, "max_new_tokens": 9}, 9),
        ({"min_new_tokens": 80}, 80),
        ({"max_length": 10}, 0),
    ],
)
def test_how_many_tokens_an_answer_to_ten_tokens_may_have(settings, expected):
    assert GenerationSettings.from_values(settings, "x").count_new_tokens(10) == expected
