"""load() and the handle over real ranks: the same tokens for any stages, and clean ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import make_config, tensors_of
from transformers import AutoModelForCausalLM, GenerationConfig

import dist_int8
from dist_int8.errors import RankError

PROMPTS = ["The capital of France is", "a", "Once upon a time, there was", "42 + 17 =", "Größe"]
OPTIONS = {"progress": False, "threads_per_stage": 1, "max_tokens": 96}


def is_running(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def one_stage(tiny_llama):
    with dist_int8.load(tiny_llama, devices=["cpu"], **OPTIONS) as model:
        yield model


@pytest.fixture(scope="module")
def two_stages(tiny_llama):
    with dist_int8.load(tiny_llama, devices=["cpu"] * 2, **OPTIONS) as model:
        yield model


@pytest.fixture(scope="module")
def expected(one_stage):
    """Each prompt alone, on one stage."""
    return [one_stage.generate(prompt, max_new_tokens=12)[0] for prompt in PROMPTS]


def test_repr_names_the_model_and_its_stages(tiny_llama, two_stages):
    text = f"<Model llama {str(tiny_llama)!r}, cpu: blocks 0-1, cpu: blocks 2-3>"
    assert repr(two_stages) == text


def test_devices_and_dtype_of_torch_are_accepted(tiny_llama):
    devices, dtype = [torch.device("cpu")], torch.bfloat16
    with dist_int8.load(tiny_llama, devices=devices, dtype=dtype, **OPTIONS) as model:
        assert (model.settings.devices, model.settings.dtype) == (["cpu"], "bfloat16")
    assert repr(model).endswith(", closed>")
    with pytest.raises(dist_int8.ShuttingDownError, match=r"^the model is shut down; call load"):
        model.generate("abc")


def test_two_stages_and_batching_change_no_token(two_stages, expected):
    together = two_stages.generate(PROMPTS, max_new_tokens=12)
    alone = [two_stages.generate(prompt, max_new_tokens=12)[0] for prompt in PROMPTS]
    for want, batch, single in zip(expected, together, alone, strict=True):
        assert want.token_ids == batch.token_ids == single.token_ids
        assert want.text == batch.text == single.text
    assert together[0].num_stages == 2 and together[0].num_micro_batches == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batches": 4},
        {"micro_batches": 3, "max_sequences": 2},
        {"prefill_chunk": 5, "max_sequences": 3},
    ],
)
def test_three_stages_change_no_token(tiny_llama, expected, settings):
    with dist_int8.load(tiny_llama, devices=["cpu"] * 3, **OPTIONS, **settings) as model:
        answers = model.generate(PROMPTS, max_new_tokens=12)
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
    assert answers[0].stages[0]["blocks"][0] == 0 and answers[0].stages[-1]["blocks"][1] == 3


def test_floating_point_logits_equal_transformers(tiny_llama):
    input_ids = torch.randint(0, 287, (2, 21), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        expected_logits = theirs(input_ids).logits
    options = OPTIONS | {"int8": False, "prefill_chunk": 8}
    with dist_int8.load(tiny_llama, devices=["cpu"] * 2, **options) as model:
        logits = model.logits(input_ids)
        answer = model.generate(input_ids.tolist(), max_new_tokens=8)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    for row, mine in zip(input_ids, answer, strict=True):
        generated = theirs.generate(
            row[None], generation_config=GenerationConfig(max_new_tokens=8, do_sample=False)
        )
        assert mine.token_ids == generated[0, 21:].tolist()


def test_int8_logits_are_the_same_on_two_stages(one_stage, two_stages):
    input_ids = torch.arange(40).view(2, 20)
    assert torch.equal(one_stage.logits(input_ids), two_stages.logits(input_ids))


def test_stage_bytes_are_exact(one_stage, two_stages):
    held = {t.data_ptr(): t.nbytes for t in tensors_of(one_stage._engine.pipeline.stage.model)}
    assert one_stage.plan.stages[0].bytes == sum(held.values())
    first = tensors_of(two_stages._engine.pipeline.stage.model)
    assert two_stages.plan.stages[0].bytes == sum(t.nbytes for t in first)


def test_rank_0_submits_in_the_order_of_the_schedule(two_stages):
    from dist_int8.pipeline import schedule

    engine = two_stages._engine
    before = engine.num_steps
    two_stages.generate(["ab", "cd"], max_new_tokens=6)
    grid = schedule.build(2, 2, num_prefill_chunks=1, num_decode_steps=5)
    planned = [(row[0].kind, row[0].micro_batch) for row in grid if row[0]]
    done = engine.pipeline.trace.since(before)
    assert [(record.kind, record.lane) for record in done] == planned
    assert all(len(record.spans) == 2 for record in done)
    assert two_stages.schedule(2, num_decode_steps=5) == schedule.draw(grid)


def test_seeded_sampling_is_reproducible_and_batch_invariant(one_stage, two_stages):
    settings = {"max_new_tokens": 10, "temperature": 0.9, "top_p": 0.95, "seed": 3}
    alone = one_stage.generate(PROMPTS[0], **settings)[0]
    batch = two_stages.generate(PROMPTS, **settings)
    assert alone.token_ids == batch[0].token_ids
    assert [c.token_ids for c in batch] == [
        c.token_ids for c in two_stages.generate(PROMPTS, **settings)
    ]
    other = one_stage.generate(PROMPTS[0], **(settings | {"seed": 4}))[0]
    assert other.token_ids != alone.token_ids


def test_generation_config_of_transformers_is_understood(one_stage):
    config = GenerationConfig(max_new_tokens=5, do_sample=False)
    assert len(one_stage.generate("abc", generation_config=config)[0].token_ids) == 5
    with pytest.raises(ValueError, match="num_beams"):
        one_stage.generate("abc", generation_config=GenerationConfig(num_beams=4))


def test_streaming_gives_the_same_text_in_pieces(two_stages, expected):
    seen: list[list[str]] = [[] for _ in PROMPTS]
    two_stages.generate(
        PROMPTS, max_new_tokens=12, on_token=lambda token: seen[token.index].append(token.text)
    )
    assert ["".join(pieces) for pieces in seen] == [e.text for e in expected]
    stream = two_stages.generate(PROMPTS[0], max_new_tokens=12, stream=True)
    tokens = []
    with pytest.raises(StopIteration) as end:
        while True:
            tokens.append(next(stream))
    assert [answer.text for answer in end.value.value] == [expected[0].text]
    assert [token.token_id for token in tokens] == expected[0].token_ids
    assert tokens[-1].finish_reason == "length" and tokens[0].finish_reason is None


def test_a_stream_that_is_closed_early_leaves_nothing_behind(two_stages, expected):
    stream = two_stages.generate(PROMPTS, max_new_tokens=12, stream=True)
    next(stream)
    stream.close()
    assert two_stages.generate(PROMPTS[0], max_new_tokens=12)[0].token_ids == expected[0].token_ids


def test_a_stop_string_and_the_context_end_an_answer(one_stage, expected):
    text = expected[0].text
    stop = text[3:5]
    answer = one_stage.generate(PROMPTS[0], max_new_tokens=12, stop=[stop])[0]
    assert answer.text == text[: text.index(stop)] and answer.finish_reason == "stop"
    long = one_stage.generate([[1] * 90], max_new_tokens=50)[0]
    assert long.finish_reason == "length" and len(long.token_ids) == 96 - 90


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt 0 must have at least one token"),
        ([[1] * 96], "at most 95 tokens long .*got 96; shorten it or raise max_tokens"),
        ([[1, 288]], "token ids of prompt 0 must be integers 0 to 287, got 288"),
        ([[1], [-1]], "prompt 1"),
        (None, "prompts must be text, token ids or a list of either, got NoneType"),
        ([3.5], "prompt 0 must be text or token ids, got 3.5"),
        ("a\udcff", "prompt 0 must be valid text"),
    ],
)
def test_bad_prompts_are_refused_and_the_model_goes_on(one_stage, prompts, message):
    with pytest.raises(ValueError, match=message):
        one_stage.generate(prompts)
    assert one_stage.generate("abc", max_new_tokens=1)[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": ["cpu"] * 5}, "stages must be at most the model's 4 blocks, got 5"),
        ({"gpus": 400}, "gpus must be at most the number of GPUs seen"),
        ({"devices": ["cpu"], "max_tokens": 300}, "at most the model's 256 positions, got 300"),
        ({"devices": ["cpu"], "memory": ["1000B"]}, "stage 0 on cpu must fit 1000 B"),
        ({"devices": ["cpu"], "threads": 2}, "threads"),
        ({"devices": ["cpu"], "threads_per_stage": 10**6}, "at most this machine's .* cores"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(tiny_llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        dist_int8.load(tiny_llama, progress=False, **arguments)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        dist_int8.load(tmp_path / "nothing", devices=["cpu"])


@pytest.mark.parametrize("victim", [1, 2])
def test_a_rank_that_dies_during_generate_is_named_and_ends_all_ranks(tiny_llama, victim):
    model = dist_int8.load(tiny_llama, devices=["cpu"] * 3, **OPTIONS)
    children = dict(model._engine.pipeline.world.children)
    stream = model.generate(PROMPTS, max_new_tokens=80, stream=True)
    next(stream)
    children[victim].kill()
    started = time.monotonic()
    with pytest.raises(RankError, match=f"rank {victim} .*SIGKILL"):
        for _ in stream:
            pass
    assert time.monotonic() - started < 10
    assert not any(is_running(child.pid) for child in children.values())
    with pytest.raises(RankError, match="load the model again"):
        model.generate("abc")


def test_children_end_with_the_session_however_it_ends(tiny_llama):
    program = f"""
import dist_int8, os
model = dist_int8.load({str(tiny_llama)!r}, devices=["cpu", "cpu"], progress=False)
print(model._engine.pipeline.world.children[1].pid, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as session:
        child = int(session.stdout.readline())
        assert is_running(child)
        session.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_stopped_rank_ends_with_its_session(tiny_llama):
    program = f"""
import dist_int8, os, signal
model = dist_int8.load({str(tiny_llama)!r}, devices=["cpu", "cpu"], progress=False)
child = model._engine.pipeline.world.children[1].pid
os.kill(child, signal.SIGSTOP)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, capture_output=True, text=True, env=environment)
    child = int(output.stdout)
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_second_load_in_one_session_works(tiny_llama):
    for _ in range(2):
        with dist_int8.load(tiny_llama, devices=["cpu"] * 2, **OPTIONS) as model:
            assert len(model.generate("abc", max_new_tokens=2)[0].token_ids) == 2


def test_weights_that_overflow_end_in_a_clear_error(tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.input_layernorm.weight"][:] = 3e38  # times 1.2 it leaves fp32
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with (
        dist_int8.load(tmp_path, devices=["cpu"], **OPTIONS) as model,
        pytest.raises(RuntimeError, match="must be numbers, got NaN"),
    ):
        model.generate("abc", max_new_tokens=2)


def test_importing_does_not_import_torch():
    program = "import dist_int8, sys, json; print(json.dumps('torch' in sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert json.loads(output.stdout) is False


def test_bad_arguments_of_logits_and_generate_are_refused(one_stage):
    with pytest.raises(ValueError, match="logits: input_ids must be integers"):
        one_stage.logits([[1, 2], [1]])
    with pytest.raises(ValueError, match="logits: token ids of prompt 0"):
        one_stage.logits([[10**7]])
    with pytest.raises(ValueError, match="stream must be true or false"):
        one_stage.generate("abc", stream=print)
    for given, got in (
        ({"on_token": 5}, "got int"),
        ({"on_token": print, "stream": True}, "got s"),
    ):
        with pytest.raises(ValueError, match=f"on_token must be a function, .* {got}"):
            one_stage.generate("abc", **given)
    with pytest.raises(ValueError, match="settings must be GenerationSettings, got dict"):
        one_stage.request("abc", {"max_new_tokens": 3})


SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
FAMILIES = {
    "bloom": make_config("bloom", **SMALL),
    "opt": make_config("opt", **SMALL, word_embed_proj_dim=32),
    "gpt_neox": make_config("gpt_neox", **SMALL),
    "qwen2": make_config("qwen2", **SMALL, num_key_value_heads=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_tokens_on_two_ranks(family, tmp_path):
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
    options = {"progress": False, "threads_per_stage": 1, "max_tokens": 32}
    with dist_int8.load(tmp_path, devices=["cpu"], **options) as model:
        expected = [model.generate(prompt, max_new_tokens=8)[0].token_ids for prompt in prompts]
    with dist_int8.load(tmp_path, devices=["cpu"] * 2, **options) as model:
        assert [a.token_ids for a in model.generate(prompts, max_new_tokens=8)] == expected
