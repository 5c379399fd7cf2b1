"""Settings: what is accepted, and that every mistake is one line with file, key and advice."""

import runpy
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from transformers import GenerationConfig

from dist_int8.config import (
    GenerationSettings,
    Settings,
    load_settings,
    parse_byte_size,
    write_yaml,
)

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def error_of(call, *arguments, **named) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    return message


def settings_file(tmp_path, text) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("79GiB", 79 * 1024**3),
        ("80GB", 80 * 1000**3),
        ("1.5 MiB", 3 * 1024**2 // 2),
        ("512KB", 512_000),
        (1_048_576, 1_048_576),
        ("80000000000", 80_000_000_000),
        ("4096B", 4096),
    ],
)
def test_byte_sizes(text, num_bytes):
    assert parse_byte_size(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    ["79GiBs", "GiB", "-1GiB", "0GB", 0, True, None, "79 gib", 1.5, "80%", "8e9", "9" * 30 + "GB"],
)
def test_other_text_is_refused_as_a_byte_size(text):
    assert repr(text) in error_of(parse_byte_size, text)


def test_yaml_file_and_overrides(tmp_path):
    path = settings_file(
        tmp_path, 'devices: [cpu, cpu]\nint8: no\noutlier_threshold: 6\nmemory: {"cpu": 2GiB}\n'
    )
    settings = load_settings(path, model=Path("folder"), outlier_threshold=None, micro_batches=3)
    assert settings.devices == ["cpu", "cpu"] and settings.int8 is False
    assert settings.outlier_threshold == 6.0 and settings.micro_batches == 3
    assert settings.model == "folder" and settings.find_budget(1, "cpu") == 2 * 1024**3


def test_an_override_of_the_layout_replaces_all_of_it(tmp_path):
    path = settings_file(tmp_path, "devices: [cpu, cpu]\n")
    settings = load_settings(path, gpus=3)
    assert (settings.devices, settings.gpus, settings.stages) == (None, 3, None)


def test_memory_of_a_stage():
    assert load_settings(memory=["1GiB", "2GiB"]).find_budget(1, "cuda:1") == 2 * 1024**3
    assert load_settings(memory={"cuda:1": "5MB"}).find_budget(0, "cuda:0") is None
    assert load_settings().find_budget(0, "cpu") is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stages: 2\nmodel: x\nstages: 3\n", ["stages", "once", "lines 1 and 3"]),
        ("outlier_treshold: 6\n", ["outlier_treshold", "did you mean outlier_threshold?"]),
        ("zzz: 6\n", ["zzz", "docs/settings.md lists all settings"]),
        ("temperature: 1\n", ["it belongs to one generation: give it to generate(temperature=)"]),
        ("kv: null\nfoo: null\n", ["foo must be a known setting"]),
        ("memory: [80]\n", ['with its unit, got 80, which is 80 bytes; write "80GiB"']),
        ("model: &a [*a]\n", ["got more than 20000 values through its aliases"]),
        ("model: " + "[" * 5000 + "]" * 5000, ["got lists nested too deeply"]),
        ("model: 2001-99-99\n", ["a value that cannot be read (month must be in 1..12)"]),
        ("stages: two\n", ["stages must be an integer or a list", "got 'two'; write 4 or"]),
        ("gpus: yes\n", ["gpus must be an integer, got True"]),
        ("gpus: 0\n", ["gpus must be at least 1, got 0"]),
        ("outlier_threshold: .nan\n", ["outlier_threshold must be a finite number, got nan"]),
        ("outlier_threshold: 1e3\n", ["outlier_threshold must be a number, got '1e3'"]),
        ("outlier_rule: rows\n", ["'none', 'absolute', 'row_rms' or 'all', got 'rows'"]),
        ("dtype: int4\n", ["dtype", "'bfloat16'", "got 'int4'"]),
        ("devices: [cpu, gpu]\n", ["devices must be cpu or cuda:N, got 'gpu'"]),
        ("devices: []\n", ["devices must be non-empty, got []"]),
        ("memory: [79GiB, lots]\n", ["memory must be a byte size above 0, got 'lots'"]),
        ("memory: 79GiB\n", ["memory must be a list", "got '79GiB'"]),
        ("devices: [cpu]\ngpus: 1\n", ["gpus must be left out when devices is given"]),
        ("devices: [cpu, cpu]\nstages: 3\n", ["stages must be the number of devices, 2, got 3"]),
        ("gpus: 2\nmemory: [79GiB]\n", ["memory must be one byte size per stage, 2, got 1"]),
        ('devices: [cpu]\nmemory: {"cuda:0": 1GiB}\n', ["name every device, got no cpu"]),
        ("- stages\n", ["must be a mapping of settings, got list"]),
        ("stages: [2\n", ["settings.yaml:2: config must be valid YAML"]),
        ("a: !!python/object/apply:os.system [true]\n", ["must be valid YAML", "constructor"]),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, parts):
    message = error_of(load_settings, settings_file(tmp_path, text))
    for part in ["settings.yaml:", *parts]:
        assert part in message


def test_nested_duplicate_keys_are_refused(tmp_path):
    path = settings_file(tmp_path, 'memory: {"cpu": 1GiB, "cpu": 2GiB}\n')
    assert "cpu must be given once" in error_of(load_settings, path)


def test_unreadable_files(tmp_path):
    assert "got no such file" in error_of(load_settings, tmp_path / "none.yaml")
    assert "must be the path of a YAML file, got 5" in error_of(load_settings, 5)
    (tmp_path / "number.yaml").write_text("1: 2")
    message = error_of(load_settings, tmp_path / "number.yaml")
    assert "number.yaml:1: a key must be the name of a setting, got 1; docs/" in message
    assert "must be a readable" in error_of(load_settings, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: Gr\xf6\xdfe\n")
    assert "UTF-8" in error_of(load_settings, tmp_path / "latin.yaml")


def test_a_file_without_end_and_one_without_a_name(tmp_path):
    assert "got more than 1048576 bytes" in error_of(load_settings, "/dev/zero")
    assert "must be the path of a YAML file, got ''" in error_of(load_settings, "")
    assert "embedded null byte" in error_of(load_settings, "a\0b")


def test_aliases_cannot_grow_without_bounds(tmp_path):
    """A few hundred bytes that stand for a thousand million values, also in the error about it."""
    names = "abcdefghi"
    lines = [f"{names[0]}: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join(['*' + a] * 10)}]" for a, b in pairwise(names)]
    message = error_of(load_settings, settings_file(tmp_path, "\n".join(lines)))
    assert "must be a short mapping" in message and len(message) < 300


def test_an_alias_saves_writing(tmp_path):
    path = settings_file(tmp_path, "gpus: 3\nmemory: [&most 79GiB, *most, *most]\n")
    assert load_settings(path).memory == [79 * 1024**3] * 3


def test_null_is_the_default_everywhere(tmp_path):
    path = settings_file(tmp_path, "kv: null\nstages:\ninterface: ~\nmax_sequences: null\n")
    assert load_settings(path) == load_settings(kv=None, max_sequences=None) == Settings()
    assert Settings.from_values({"kv": None}, "x") == Settings()


def test_the_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.yaml").write_text("model: ~/m\ncalibrate: ~/c.txt\nprofile: [~/p.yaml, cpu]\n")
    for settings in (
        load_settings("~/s.yaml"),
        load_settings(model=Path("~/m"), calibrate="~/c.txt", profile=["~/p.yaml", "cpu"]),
    ):
        assert settings.model == f"{tmp_path}/m" and settings.calibrate == f"{tmp_path}/c.txt"
        assert settings.profile == [f"{tmp_path}/p.yaml", "cpu"]
    write_yaml("~/out.yaml", {"kv": "int8"}, "written")
    assert load_settings(tmp_path / "out.yaml").kv == "int8"


def test_errors_about_flags_are_in_flags():
    flags = {"threads_per_stage": "--threads", "devices": "--devices", "stages": "--stages"}
    for values, part in (
        (
            {"threads_per_stage": 0},
            "--threads must be at least 1, got 0; write it like `--threads 1`",
        ),
        (
            {"devices": ["gpu"]},
            "--devices must be cpu or cuda:N, got 'gpu'; write it like `--devices cpu,cpu`",
        ),
        (
            {"devices": ["cpu"], "stages": 3},
            "t:stages: --stages must be the number of devices, 1, got 3",
        ),
        ({"devices": ["cuda:1000"]}, "--devices must be cpu or cuda:N, got 'cuda:1000'"),
        ({"max_tokens": 0}, "t:max_tokens: max_tokens must be"),
    ):
        assert part in error_of(load_settings, source="t", flags=flags, **values)


def test_a_wrong_value_is_shown_short():
    message = error_of(load_settings, model=[["x" * 10**6] * 10**4] * 10**4)
    assert len(message) < 300


def test_two_mistakes_are_both_named():
    message = error_of(load_settings, gpus=-1, dtype="int4", source="load()")
    assert "load():gpus:" in message and "load():dtype:" in message


def test_no_file_is_all_defaults(tmp_path):
    assert load_settings(settings_file(tmp_path, "")) == load_settings() == Settings()


@pytest.mark.parametrize("settings", [Settings, GenerationSettings])
def test_every_setting_has_a_sentence_and_an_example_that_holds(settings):
    for name, field in settings.model_fields.items():
        assert field.description and field.description.endswith("."), name
        assert settings.from_values({name: field.examples[0]}, "example"), name


def test_the_page_of_settings_is_true():
    page = runpy.run_path(str(ROOT / "docs/settings.py"))["make_page"]()
    assert (ROOT / "docs/settings.md").read_text() == page, "run python docs/settings.py"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_are_valid_and_say_how_to_use_them(path):
    load_settings(path)
    assert f"--config configs/{path.name}" in path.read_text()


def test_there_are_configs():
    assert {"cpu-2-stages.yaml", "bloom-176b-4xa100-80gb.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"temperature": 1e-320}, "temperature must be 0 or at least 0.001"),
        ({"temperature": -0.1}, "temperature must be at least 0.0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 1.5}, "top_p must be at most 1.0, got 1.5"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "seed must be below"),
        ({"stop": [""]}, "stop must be non-empty"),
        ({"do_sample": True, "temperature": 0}, "temperature must be above 0 when do_sample"),
        ({"num_beams": 4}, "num_beams must be a known setting"),
    ],
)
def test_mistakes_in_generation_settings(values, part):
    assert part in error_of(GenerationSettings.from_values, values, "generate()")


@pytest.mark.parametrize(
    ("values", "sampling", "temperature"),
    [
        ({}, False, 1.0),
        ({"temperature": 0}, False, 1.0),
        ({"temperature": 0.5}, True, 0.5),
        ({"do_sample": True}, True, 1.0),
        ({"do_sample": False, "temperature": 0.5}, False, 0.5),
    ],
)
def test_when_it_samples(values, sampling, temperature):
    settings = GenerationSettings.from_values(values, "generate()")
    assert settings.sampling is sampling and settings.sampling_temperature == temperature


def test_one_stop_string_stands_for_a_list():
    assert GenerationSettings.from_values({"stop": "\n"}, "generate()").stop == ["\n"]


def test_generation_config_of_transformers():
    theirs = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=5, stop_strings=["."]
    )
    ours = GenerationSettings.from_generation_config(theirs, {"top_k": 3, "top_p": None})
    assert ours == GenerationSettings(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=3, max_new_tokens=5, stop=["."]
    )
    greedy = GenerationSettings.from_generation_config(theirs, {"temperature": 0})
    assert not greedy.sampling
    assert not GenerationSettings.from_generation_config(GenerationConfig(), {}).sampling


@pytest.mark.parametrize(
    "given", [{"num_beams": 4}, {"penalty_alpha": 0.5}, {"num_beam_groups": 2}]
)
def test_other_ways_of_decoding_are_refused_by_name(given):
    call = GenerationSettings.from_generation_config
    message = error_of(call, GenerationConfig(**given), {})
    assert next(iter(given)) in message and "only greedy decoding and sampling" in message


def test_json_round_trip():
    """A rank gets its settings as JSON."""
    settings = load_settings(devices=["cpu"], memory={"cpu": "1GiB"}, dtype="float32")
    copied = TypeAdapter(dict).validate_json(settings.model_dump_json())
    assert Settings.from_values(copied, "rank 1") == settings
