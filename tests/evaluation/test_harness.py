"""The harness scores our pipeline as it scores transformers' own model with the same weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import dist_int8
from dist_int8.cli.app import app
from dist_int8.evaluation.harness import PipelineLM
from dist_int8.evaluation.tasks import evaluate, run_tasks, scores_of, table

TASKS = Path(__file__).parents[2] / "benchmarks" / "tasks"
OPTIONS = {"threads_per_stage": 1, "progress": False, "max_sequences": 8, "dtype": "float32"}


def instances(kind, *arguments):
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def theirs(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tiny_llama))


@pytest.fixture(scope="module")
def ours(tiny_llama):
    options = {"devices": ["cpu"] * 2, "max_tokens": 256, "int8": False, **OPTIONS}
    with dist_int8.load(tiny_llama, **options) as model:
        yield PipelineLM(model)


def assert_same(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (mine, _), (other, _) in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)


LONG = "It was a dark and stormy night. " * 12  # 384 bytes, as many tokens; the context is 256


def test_loglikelihoods_are_those_of_the_hf_model(ours, theirs):
    requests = instances(
        "loglikelihood",
        ("The cat sat on the", " mat"),
        ("The cat sat on the", " mat and purred"),
        ("The cat sat on the", " hat"),
        ("", "No context at all"),
        ("A trailing space ", "moves over"),
        ("<end>begun already", " so"),
        (LONG, "cut from the left"),
        ("short", LONG[:240]),
        ("x", "y"),
        ("x", "z"),  # differs in its last token only: shares a pass
        ("The cat sat on the", " mat"),  # twice
    )
    assert_same(ours.loglikelihood(requests), theirs.loglikelihood(requests))


def test_greedy_continuations_are_recognized(ours, theirs):
    context = "Once upon a time"
    (written,) = theirs.generate_until(
        instances("generate_until", (context, {"until": [], "max_gen_toks": 6}))
    )
    requests = instances("loglikelihood", (context, written[:4]), (context, "qqqq"))
    found = ours.loglikelihood(requests)
    assert_same(found, theirs.loglikelihood(requests))


def test_rolling_loglikelihoods_are_those_of_the_hf_model(ours, theirs):
    requests = instances("loglikelihood_rolling", (LONG,), ("One window.",), (LONG * 2 + "!",))
    found = ours.loglikelihood_rolling(requests)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests), abs=5e-3)


def test_answers_equal_those_of_the_hf_model(ours, theirs):
    (free,) = theirs.generate_until(
        instances("generate_until", ("Tell me", {"until": [], "max_gen_toks": 24}))
    )
    middle = free[8:10]
    assert middle  # a stop string that does come
    requests = instances(
        "generate_until",
        ("Tell me", {"until": [], "max_gen_toks": 24}),
        ("Tell me", {"until": [middle], "max_gen_toks": 24}),
        ("Tell me", {"until": ["never", middle, "\n"], "max_gen_toks": 24}),
        (LONG, {"until": "\n", "max_gen_toks": 16}),
        ("A", {"until": ["\n"], "max_new_tokens": 12, "temperature": 0.0, "do_sample": False}),
        ("A penalty", {"until": [], "max_gen_toks": 12, "repetition_penalty": 1.3}),
    )
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests)
    assert found[1] == free[: free.index(middle)]


def test_sampled_answers_can_be_repeated(ours):
    sampled = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = instances("generate_until", ("Say", sampled), ("Say", sampled))
    first = ours.generate_until(requests)
    assert first == ours.generate_until(requests)
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_gen_toks": 256}, "below the context of 256 tokens, got 256"),
        ({"max_gen_toks": 4, "num_beams": 4}, "got num_beams; leave it out"),
    ],
)
def test_unsupported_generation_options_are_refused(ours, given, message):
    with pytest.raises(ValueError, match=message):
        ours.generate_until(instances("generate_until", ("A", given)))


def test_local_tasks_score_the_same_as_the_hf_model(ours, theirs):
    names = ["plays_cloze", "plays_next_line", "plays_write"]
    options = {"task_folder": TASKS, "limit": 6}
    mine, other = evaluate(ours, names, **options), evaluate(theirs, names, **options)
    found, expected = scores_of(mine), scores_of(other)
    assert {score.metric for score in found} >= {"acc", "acc_norm", "perplexity"}
    for score, reference in zip(found, expected, strict=True):
        assert (score.task, score.metric) == (reference.task, reference.metric)
        assert score.value == pytest.approx(reference.value, rel=1e-3)
        assert score.error == pytest.approx(reference.error, rel=1e-2)
        assert score.num_documents == 6
    for name in names:
        for sample, reference in zip(mine["samples"][name], other["samples"][name], strict=True):
            assert sample["doc"] == reference["doc"]
            if name == "plays_write":
                assert sample["resps"] == reference["resps"]
            else:
                answers = [answer for (answer,) in sample["resps"]]
                assert_same(answers, [answer for (answer,) in reference["resps"]])


def test_int8_beside_floating_point_from_the_command_line(tiny_llama, capfd):
    command = ["eval", "--model", str(tiny_llama), "--devices", "cpu", "--threads", "1"]
    command += ["--tasks", "plays_next_line,plays_write", "--task-folder", str(TASKS)]
    command += ["--limit", "5"]

    def printed(*more: str) -> str:
        CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
        return capfd.readouterr().out

    values = json.loads(printed("--json"))
    assert (values["model"], values["reference"]) == (str(tiny_llama), "fp32")
    metrics = [row["metric"] for row in values["scores"]]
    assert metrics == ["acc", "acc_norm", "exact_match,first_word"]
    for row in values["scores"]:
        assert row["num_documents"] == 5
        assert row["changed"] >= abs(row["ours"] - row["reference"]) * 5 - 1e-6
    header, line, *_ = printed("--reference", "none").splitlines()
    assert header.split() == ["task", "metric", "documents", "ours", "+-"]
    assert f"{values['scores'][0]['ours']:.4f}" in line


def test_table_shows_distance_and_changed_documents():
    row = {"task": "a", "metric": "acc", "higher_is_better": True, "num_documents": 100}
    row |= {"ours": 0.5, "reference": 0.56, "error": 0.05, "changed": 8}
    other = row | {"metric": "perplexity", "higher_is_better": False, "error": None}
    lines = table({"reference": "fp32", "scores": [row, other | {"changed": None}]}).splitlines()
    assert lines[0].split() == (
        ["task", "metric", "documents", "fp32", "ours", "+-", "apart", "changed"]
    )
    assert lines[1].split()[-6:] == ["0.5600", "0.5000", "0.0500", "1.20", "+-", "8"]
    assert "(lower is better)" in lines[2]


def test_the_harness_knows_our_model_by_name(tiny_llama):
    from lm_eval.api.registry import get_model

    model = get_model("dist_int8").create_from_arg_obj(
        {"pretrained": str(tiny_llama), "max_tokens": 64, **OPTIONS}, {"batch_size": 4}
    )
    with model.handle:
        assert model.max_length == 64
        ((logs, _),) = model.loglikelihood(instances("loglikelihood", ("a" * 200, "b")))
        assert logs < 0


def test_the_command_line_of_the_harness_knows_our_model(tiny_llama, tmp_path):
    arguments = f"pretrained={tiny_llama},int8=False,threads_per_stage=1,max_tokens=256"
    command = [sys.executable, "-m", "dist_int8.evaluation", "run", "--model", "dist_int8"]
    command += ["--model_args", f"{arguments},dtype=float32", "--device", "cpu", "--limit", "3"]
    command += ["--tasks", "plays_next_line", "--include_path", "."]
    command += ["--output_path", str(tmp_path)]  # data files are named relative to where it runs
    subprocess.run(command, check=True, capture_output=True, cwd=TASKS)
    (written,) = tmp_path.rglob("results_*.json")
    found = json.loads(written.read_text())
    assert found["config"]["model"] == "dist_int8"
    (expected, *_) = run_tasks(str(tiny_llama), ["plays_next_line"], task_folder=TASKS, limit=3)
    assert found["results"]["plays_next_line"]["acc,none"] == pytest.approx(expected.value)


def test_device_beside_devices_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="device must not be given beside devices, got 'cpu'"):
        PipelineLM(tiny_llama, device="cpu", devices=["cpu"], **OPTIONS)


@pytest.mark.parametrize(
    ("names", "folder", "message"),
    [
        (["plays_cloze", "no_such"], TASKS, "got no_such; it has plays_cloze, plays_next_line"),
        ([], TASKS, "tasks must name at least one task"),
        (["plays_cloze"], TASKS / "none", "task_folder must be a folder of task files"),
    ],
)
def test_unknown_tasks_are_refused_before_a_model_is_loaded(names, folder, message):
    with pytest.raises(ValueError, match=message):
        run_tasks("no-such-model", names, task_folder=folder)


def test_invalid_task_file_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: [mine\n")
    with pytest.raises(ValueError, match=r"it has none; mine.yaml cannot be read: .* line 2"):
        run_tasks("/no/such/model", ["mine"], task_folder=tmp_path)


def test_missing_harness_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dist_int8\[eval\]'"):
        run_tasks("any", ["plays_cloze"], task_folder=TASKS)
