"""Engines that are compared on a CPU: their processes, stopwatch and table."""

import json
import sys
import time
from pathlib import Path

import gguf
import pytest
import torch
from engines import comparison
from engines.catalogue import Engine
from engines.gguf_file import write_gguf
from engines.models import finish, write_w8a8
from engines.process import EngineProcess, Neighbours
from engines.table import format_table, lost_cells, summarize_records
from engines.worker import Stopwatch
from gpu.records import Records
from safetensors.torch import load_file

ENGINES = Path(sys.modules["engines.process"].__file__).parent
# counts up from the last token of each prompt; a prompt that begins with 9 hangs, with 8 dies
COUNTING = f"""
import os, sys, time
sys.path.insert(0, {str(ENGINES)!r})
from worker import serve

class Counting:
    version, weight_bytes = "1", 1000

    def __init__(self, args):
        print("noise of an engine", args.threads)
        if args.variant == "broken":
            raise ValueError("no such weights")

    def generate(self, prompts, num_tokens, watch):
        if prompts[0][0] == 9:
            time.sleep(1000)
        if prompts[0][0] == 8:
            os._exit(3)
        for i in range(num_tokens):
            time.sleep(0.002)
            watch.note_all([prompt[-1] + 1 + i for prompt in prompts])

serve(Counting)
"""


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    started = []

    def start(variant=""):
        command = [sys.executable, str(script), "model", f"--variant={variant}"]
        started.append(EngineProcess(command, tmp_path / "log", 60))
        return started[-1]

    yield start
    for process in started:
        process.end()


def test_engine_answers_cells_and_is_stopped_between_them(start):
    process = start()
    assert process.loaded["version"] == "1" and process.loaded["weight_bytes"] == 1000
    answer = process.ask({"prompts": [[1, 2], [5, 6]], "num_tokens": 3}, 60)
    assert answer["token_ids"] == [[3, 4, 5], [7, 8, 9]]
    # 2 sequences, 2 steps of at least 2 ms after the first
    assert 0 < answer["decode"] <= 4 / 0.004 and 0 < answer["prefill"] <= 4 / 0.002
    assert process.resident_bytes() > 1 << 20
    state = Path(f"/proc/{process._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    assert state == "T"
    assert process.ask({"prompts": [[3]], "num_tokens": 1}, 60)["token_ids"] == [[4]]


def test_engine_that_fails_hangs_or_dies_gives_its_own_error(start):
    assert "no such weights" in start("broken").loaded["error"]
    process = start()
    started = time.monotonic()
    hung = process.ask({"prompts": [[9]], "num_tokens": 1}, 0.5)
    assert "no answer within" in hung["error"] and time.monotonic() - started < 20
    assert not process.is_alive and "error" in process.ask({"prompts": [[1]], "num_tokens": 1}, 1)
    assert "status 3" in start().ask({"prompts": [[8]], "num_tokens": 1}, 60)["error"]


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """A comparison of counting engines, one of which is broken; called again, it goes on."""
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    engines = {
        "transformers-fp32": Engine(str(script)),
        "fine": Engine(str(script)),
        "broken": Engine(str(script), variant="broken"),
    }
    monkeypatch.setattr(comparison, "ENGINES", engines)
    conditions = comparison.Conditions(tmp_path, 1, 0, False, 4, 60.0)
    records = Records(tmp_path / "records.jsonl", "peers")
    made = []

    def compare():
        made.append(comparison.Comparison("demo", conditions, records, list(range(10, 90))))
        return made[-1]

    yield compare
    for one in made:
        one.end()


def test_comparison_keeps_figures_and_gives_up_on_an_engine_that_does_not_load(compare):
    first = compare()
    record = first.measure("fine", "decode-8", 0)
    assert record["tokens_per_s"] > 0 and first.measure("fine", "decode-8", 0) is None
    (loaded,) = first.records.mine("loaded")
    assert loaded["equal_answers"] == 3 and loaded["agreement"] == 1
    for cell in ("decode-1", "decode-8"):
        assert "no such weights" in first.measure("broken", cell, 0)["error"]
    assert first.measure("broken", "prefill-512", 0) is None
    again = compare()
    assert again.has("fine", "decode-8", 0) and not again.has("fine", "decode-8", 1)
    assert not again.has("broken", "decode-8", 0)


def test_neighbours_are_busy_and_gone_afterwards():
    with Neighbours(2, pinned=True) as neighbours:
        pids = [process.pid for process in neighbours._processes]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_stopwatch_counts_decode_from_the_last_first_token(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch([[1, 2, 3], [4]])
    for seconds, index in ((1.0, 0), (1.5, 0), (2.0, 1), (3.0, 0), (4.0, 1)):
        now[0] = seconds
        watch.note(index, 7)
    # 4 prompt tokens in 2 s; then 2 tokens in 2 s
    assert watch.figures() == {"prefill": 2.0, "decode": 1.0, "seconds": 4.0}


def make_llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = {
        "model": {"vocab": {"a": 3, "b": 4, "ab": 5}, "merges": [["a", "b"]]},
        "added_tokens": [{"id": 1, "content": "<s>"}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text("{}")
    finish(folder)
    return model.float()


def test_gguf_file_is_read_back_by_transformers(tmp_path):
    """transformers' own reader of GGUF undoes names, order of rows and blocks of Q8_0."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = make_llama(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    theta = reader.fields["llama.rope.freq_base"]
    assert theta.parts[theta.data[0]][0] == 12345.0
    with torch.device("meta"):
        empty = type(model)(model.config)
    loaded = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=empty)
    state = model.state_dict()
    assert len(loaded["tensors"]) == len(state) - 1  # the head is the embedding
    for name, weight in loaded["tensors"].items():
        step = state[name].abs().max().item() / 127
        torch.testing.assert_close(weight.float(), state[name], atol=0.51 * step, rtol=1e-3)


def test_w8a8_checkpoint_rounds_the_linears_of_the_blocks(tmp_path):
    model = make_llama(tmp_path / "model")
    write_w8a8(tmp_path / "model", tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    scale = tensors[name + "_scale"]
    assert tensors[name].dtype == torch.int8 and scale.shape == (64, 1)
    error = (tensors[name].float() * scale.float() - model.state_dict()[name]).abs()
    assert (error <= 0.51 * scale.float()).all()
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["rope_theta"] == 12345.0


def test_table_gives_medians_shares_and_lost_cells(tmp_path):
    make_llama(tmp_path / "demo")
    conditions = [2, 0, False, 32]
    loaded = {"kind": "loaded", "model": "demo", "conditions": conditions, "equal_answers": 3}
    figure = {"kind": "figure", "model": "demo", "conditions": conditions, "cell": "decode-1"}
    records = [
        {"kind": "machine", "conditions": conditions, "read_gb_per_s": 10.0, "int8_gops": 50.0},
        {**loaded, "engine": "dist_int8", "weight_bytes": 10**8},
        {**loaded, "engine": "openvino", "weight_bytes": 2 * 10**8},
        *({**figure, "engine": "dist_int8", "tokens_per_s": speed} for speed in (1, 40, 50)),
        {**figure, "engine": "openvino", "tokens_per_s": 20.0},
        {**figure, "engine": "openvino", "tokens_per_s": 900.0, "conditions": [2, 1, False, 32]},
        {**figure, "kind": "failure", "engine": "vllm-bf16", "error": "no AVX-512"},
    ]
    summary = summarize_records(records, conditions, tmp_path)
    cell = summary["demo"]["cells"]["decode-1"]
    assert cell["dist_int8"]["tokens_per_s"] == 40 and cell["dist_int8"]["samples"] == 3
    assert cell["dist_int8"]["share_of_machine"] == pytest.approx(0.4)
    assert cell["openvino"]["tokens_per_s"] == 20 and summary["demo"]["lost"] == {}
    table = format_table(summary)
    assert "| dist_int8 | 100 | 40.0 (40%) | 3 of 3 |" in table
    assert "- failed, vllm-bf16, decode-1: no AVX-512" in table
    cell["openvino"]["tokens_per_s"] = 80
    assert "openvino" in lost_cells(summary["demo"]["cells"])["decode-1"]
