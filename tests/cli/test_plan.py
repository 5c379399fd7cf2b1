"""`dist-int8 plan` and `bench`: JSON, exit codes, saved plans, errors."""

import json
from pathlib import Path

import pytest
import yaml

from dist_int8.cli import app
from dist_int8.config import load_settings
from dist_int8.partition import DeviceProfile

ROOT = Path(__file__).parents[2]
BLOOM = str(ROOT / "configs" / "models" / "bloom-176b")
KEYS = [
    *(
        "fits",
        "model",
        "numerics",
        "num_blocks",
        "block_bytes",
        "model_bytes",
        "kv_bytes_per_token",
    ),
    *("kv_tokens", "ms_per_token", "ms_per_token_alone", "stages", "missing_bytes", "suggestions"),
]


def run(capsys, *arguments):
    code = app.run(["plan", *map(str, arguments)])
    return code, capsys.readouterr()


def as_json(capsys, *arguments):
    code, shown = run(capsys, *arguments, "--json")
    assert shown.err == ""
    return code, json.loads(shown.out)


def test_bloom_on_four_a100(capsys):
    code, found = as_json(capsys, "--model", BLOOM, "--gpus", 4, "--memory", "80GB")
    assert code == 0 and list(found) == KEYS
    assert found["fits"] and found["missing_bytes"] == 0 and found["suggestions"] == []
    assert found["block_bytes"] == 2_467_139_584 and found["model_bytes"] == 179_893_116_928
    assert found["kv_bytes_per_token"] == 4_014_080 and found["kv_tokens"] > 20_000
    assert [stage["blocks"] for stage in found["stages"]] == [[0, 17], [18, 35], [36, 53], [54, 69]]
    for rank, stage in enumerate(found["stages"]):
        assert list(stage) == ["rank", "host", "device", "blocks", "bytes", "ms"]
        assert (stage["rank"], stage["device"]) == (rank, f"cuda:{rank}")
        assert sum(stage["bytes"].values()) == 80 * 10**9 and min(stage["bytes"].values()) >= 0
    assert sum(stage["ms"] for stage in found["stages"]) == pytest.approx(found["ms_per_token"])


@pytest.mark.parametrize(
    ("gpus", "memory", "code"), [(3, "80GB", 0), (5, "40GB", 0), (8, "40GB", 0), (4, "40GB", 2)]
)
def test_other_machines(capsys, gpus, memory, code):
    got, found = as_json(capsys, "-m", BLOOM, "--gpus", gpus, "--memory", memory)
    assert got == code and found["fits"] == (code == 0)
    assert (found["missing_bytes"] > 0) == (code == 2) == bool(found["suggestions"])


def test_flags_change_the_question(capsys):
    base = ["-m", BLOOM, "--gpus", 4, "--memory", "80GB"]

    def stage(*flags):
        return as_json(capsys, *base, *flags)[1]["stages"][0]["bytes"]

    assert stage("--embedding", "int8")["weights"] < stage()["weights"]
    asked = stage("--sequences", 2, "--context", 1024)
    assert asked["kv"] == 2 * 1024 * 57_344 * 18
    assert stage("--reserve", "2GiB")["reserve"] == 2 * 1024**3
    assert stage("--reserve", "0")["reserve"] == 0
    last = [as_json(capsys, *base, "--head", f)[1]["stages"][3] for f in ("int8", "16bit")]
    assert last[0]["ms"] < last[1]["ms"]
    hot = as_json(capsys, *base, "--hot-columns", 16)[1]["block_bytes"]
    features = 43_008 + 14_336 + 57_344  # and those of down
    in_down = 64 * (2 * 14_336 + 4)
    assert hot - 2_467_139_584 == 16 * (2 * features + 3 * 4) + in_down
    few = as_json(capsys, "-m", BLOOM, "--gpus", 8, "--memory", "80GB", "--stages", "auto")
    fewer = as_json(
        capsys, "-m", BLOOM, "--gpus", 8, "--memory", "80GB", "--stages", "auto",
        "--objective", "latency",
    )  # fmt: skip
    assert len(few[1]["stages"]) == 8 and len(fewer[1]["stages"]) == 3
    mixed = as_json(capsys, "-m", BLOOM, "--gpus", 4, "--memory", "80GB", "--hosts", "a,b")[1]
    assert [s["host"] for s in mixed["stages"]] == ["a", "a", "b", "b"]
    assert [s["device"] for s in mixed["stages"]] == ["cuda:0", "cuda:1"] * 2


def test_the_table_says_what_would_fit(capsys):
    small = ["-m", BLOOM, "--gpus", 4, "--memory", "40GB"]
    missing = as_json(capsys, *small)[1]["missing_bytes"]
    assert 187_086_348_288 - 160 * 10**9 < missing < 28.5e9  # two tables, budgets; and the reserves
    code, shown = run(capsys, *small)
    assert code == 2 and f"does not fit: {missing} bytes are missing" in shown.out
    assert "add 1 more device like cuda:3: 5 in all" in shown.out and shown.err == ""
    code, shown = run(capsys, "-m", BLOOM, "--gpus", 4, "--memory", "80GB")
    first = shown.out.splitlines()[0].split()
    assert code == 0 and first[:4] == ["stage", "device", "blocks", "weights"]


def test_a_saved_plan_is_settings_that_give_the_same_plan(capsys, tmp_path):
    path = tmp_path / "plan.yaml"
    flags = ["-m", BLOOM, "--gpus", 5, "--memory", "42GB", "--head", "int8", "--hosts", "a"]
    flags += ["--embedding", "int8", "--hot-columns", 16]
    code, found = as_json(capsys, *flags, "--save", path)
    settings = load_settings(path)
    assert code == 0 and settings.model == BLOOM and len(settings.devices) == 5
    assert settings.stages == [b - a + 1 for a, b in (s["blocks"] for s in found["stages"])]
    assert settings.head == settings.embedding == "int8" and settings.skipped == ()
    assert settings.calibrates and settings.num_hot_columns == 16
    code, again = as_json(capsys, "--config", path)
    assert code == 0 and again == found


def test_a_config_plans_what_load_reserves(capsys):
    path = ROOT / "configs" / "bloom-176b-4xa100-80gb.yaml"
    code, found = as_json(capsys, "--config", path, "-m", BLOOM)
    blocks = [stage["blocks"][1] - stage["blocks"][0] + 1 for stage in found["stages"]]
    assert code == 0 and blocks == [18, 18, 18, 16]
    assert found["stages"][0]["bytes"]["kv"] == 12 * 2048 * 57_344 * 18
    code, found = as_json(capsys, "--config", path, "-m", BLOOM, "--gpus", 3, "--memory", "80GB")
    assert code == 2 and len(found["stages"]) == 3


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("", "gpus must be given, got none; write --gpus 4"),
        ("--gpus 4", "memory must be given for GPUs that are not there"),
        ("--gpus 0", "gpus must be at least 1, got 0"),
        ("--gpus 1000000", "gpus must be at most 1024, got 1000000"),
        ("--gpus 2 --memory 80GB --hot-columns 99984", "at most the model's 14336 features"),
        ("--gpus 2 --profile pin.yaml", "or a YAML file, got 'pin.yaml', which is not there"),
        ("--gpus many", "--gpus must be an integer, got 'many'"),
        ("--gpus 2 --memory -80GB", "byte size above 0, got '-80GB'"),
        ("--gpus 2 --memory 1GB,2GB,3GB", "memory must be one byte size per stage, 2, got 3"),
        ("--gpus 71 --memory 80GB", "stages must be at most the model's 70 blocks, got 71"),
        (
            "--gpus 2 --memory 80GB --stages 30,30",
            "add up to the model's 70, got [30, 30] with sum",
        ),
        ("--gpus 2 --memory 80GB --stages 70", "stages must be the number of devices, 2, got 70"),
        ("--gpus 2 --memory 80GB --stages x", "stages must be a number, `auto`, or numbers"),
        ("--gpus 2 --memory 80GB --sequences 0", "--sequences must be 1 to 2147483647, got 0"),
        ("--gpus 2 --memory 80GB --context -5", "--context must be 1 to 2147483647, got -5"),
        ("--gpus 2 --memory 80GB --head 4bit", "head must be 'int8' or '16bit'"),
        ("--gpus 2 --memory 80GB --objective x", "objective must be 'throughput'"),
        (
            "--gpus 2 --memory 80GB --prefill-ratio -1",
            "--prefill-ratio must be at least 0.0, got -1.0",
        ),
        (
            "--gpus 2 --memory 80GB --prefill-ratio 1e300",
            "ratio must be at most 1000000.0",
        ),
        ("--gpus 2 --memory 80GB --reserve -1", "reserve must be a byte size above 0"),
        (
            "--gpus 2 --memory 80GB --hot-columns -1",
            "hot_columns must be 0 or a multiple of 16, got -1; write --hot-",
        ),
        ("--gpus 3 --memory 80GB --hosts a,b", "hosts must divide the 3 stages, got 2"),
        ("--gpus 2 --memory 80", "got '80', which is 80 bytes; write \"80GiB\""),
        ("--gpus 2 --context 9999999 --stages 3,4", "add up to the model's 70, got [3, 4]"),
        ("--objective x", "--objective must be 'throughput'"),
        ("--gpus 2 --gpus 3 --memory 80GB", "--gpus must be given once, got it 2 times; keep one"),
        ("--gpus 2 --memory 80GB --save /no/x.yaml", "--save must be a file that can be written"),
        ("--gpus 2 -q -v", "--quiet must be left out with --verbose, got both"),
        ("--gpus 2 --profile a101", "profile must be one of t4, v100"),
        (
            "--gpus 2 --memory 80GB --hot-columns 8",
            "hot_columns must be 0 or a multiple of 16, got 8",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(capsys, flags, part):
    code, shown = run(capsys, "-m", BLOOM, *flags.split())
    assert code == 1 and shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("error: ") and part in shown.err


def test_an_unknown_model_is_one_line(capsys):
    for flags, part in (
        (["-m", "no/such/folder"], "no/such/folder"),
        ([], "model must be a folder with a config.json"),
    ):
        code, shown = run(capsys, *flags, "--gpus", 4, "--memory", "80GB")
        assert code == 1 and shown.out == "" and shown.err.count("\n") == 1 and part in shown.err


def test_broken_yaml_and_broken_profiles(capsys, tmp_path):
    (tmp_path / "broken.yaml").write_text("gpus: [4\n")
    code, shown = run(capsys, "--config", tmp_path / "broken.yaml")
    assert code == 1 and "broken.yaml:2: config must be valid YAML" in shown.err
    (tmp_path / "slow.yaml").write_text("name: slow\n")
    profile = tmp_path / "slow.yaml"
    code, shown = run(capsys, "-m", BLOOM, "--gpus", 1, "--memory", "80GB", "--profile", profile)
    assert code == 1 and "slow.yaml:memory_bytes" in shown.err


def test_a_measured_profile_is_one_that_plan_reads(capsys, tmp_path, monkeypatch):
    from dist_int8.profiling import device

    monkeypatch.setattr(device, "CPU_WEIGHT_BYTES", 1 << 20)
    monkeypatch.setattr(device, "REPEATS", 1)
    monkeypatch.setattr(device, "NUM_FEATURES", 256)
    path = tmp_path / "cpu.yaml"
    assert app.run(["bench", "--profile", str(path), "--name", "this"]) == 0
    assert "int8_bandwidth" in capsys.readouterr().out
    profile = DeviceProfile(**yaml.safe_load(path.read_text()))
    assert profile.name == "this" and not profile.overlaps and profile.int8_ops > 1e6
    small = ROOT / "configs" / "models" / "opt-125m"
    code, found = as_json(capsys, "-m", small, "--devices", "cpu,cpu", "--profile", path)
    assert code == 0 and found["ms_per_token"] > 0 and found["kv_tokens"] > 1000


def test_bench_and_save_refuse_missing_devices_and_folders(capsys, tmp_path):
    assert app.run(["bench", "--profile", str(tmp_path / "x.yaml"), "--device", "cuda:7"]) == 2
    assert "device must be one of cpu" in capsys.readouterr().err
    missing = tmp_path / "no" / "x.yaml"
    code, shown = run(capsys, "-m", BLOOM, "--gpus", 4, "--memory", "80GB", "--save", missing)
    assert code == 1 and "must be a file that can be written" in shown.err
    assert shown.out == "", "nothing is planned for a plan that cannot be saved"
    code, shown = run(capsys, "-m", BLOOM, "--gpus", 4, "--memory", "80GB", "--save", "/dev/full")
    assert code == 1 and "/dev/full: must be a file that can be written, got No space" in shown.err


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ("--memory 80GB", "room for: 12 sequences of 2048 tokens"),
        ("--memory 80GB --sequences 2 --context 64", "requested: 2 sequences of 64 tokens"),
        ("--memory 80GB --sequences 2", "room for: 2 sequences of 2048 tokens"),
        ("--memory 40GB", "at the least: 1 sequence of 1 token"),
        ("--devices cpu", "assumed: 1 sequence of 2048 tokens"),
        ("--config configs/bloom-176b-4xa100-80gb.yaml", "reserved by load(): 12 sequences"),
    ],
)
def test_what_was_not_asked_is_not_called_requested(capsys, flags, asked):
    gpus = [] if "devices" in flags or "config" in flags else ["--gpus", 4]
    _, shown = run(capsys, "-m", BLOOM, *gpus, *flags.split())
    assert asked in shown.out and ("requested" in shown.out) == ("requested" in asked)


def test_no_memory_is_negative(capsys):
    _, shown = run(capsys, "-m", BLOOM, "--gpus", 4, "--memory", "40GB")
    assert "lacks 6.47 GiB" in shown.out and "-6.47" not in shown.out


def test_the_time_of_one_sequence_alone(capsys):
    """Beside many sequences that are half full stands what a first try of a model shows."""
    flags = ["-m", ROOT / "configs/models/opt-125m", "--devices", "cpu,cpu"]
    many = as_json(capsys, *flags, "--sequences", 8)[1]
    one = as_json(capsys, *flags, "--sequences", 1, "--context", 256)[1]
    assert many["ms_per_token_alone"] == one["ms_per_token_alone"] == one["ms_per_token"]
    assert many["ms_per_token"] > 2 * many["ms_per_token_alone"]
    shown = run(capsys, *flags, "--sequences", 8)[1].out
    assert f"{many['ms_per_token']:.2f} ms per token of each of 8 sequences in flight" in shown
    assert f"{one['ms_per_token']:.2f} ms of one short sequence alone" in shown
