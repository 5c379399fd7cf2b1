"""Host memory: a few slices, whatever the size of a tensor."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dist_int8.checkpoint import StageFormat, find_hot_columns, load_stage, make_calibration
from dist_int8.checkpoint.writer import quantize
from dist_int8.models import StageSlice, describe, load_config

LARGEST = 2 * 3072 * 3072  # bytes of the largest tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A block of large matrices in bf16: 0.13 GB in three files."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=3072,
        intermediate_size=3072,
        num_hidden_layers=1,
        num_attention_heads=24,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(torch.int16).random_(15000, 16000)  # finite, quickly
    model.save_pretrained(folder, max_shard_size="50MB")
    return folder


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def extra_bytes(work):
    """Peak resident memory of a copy of this process over its beginning, less what `work` keeps."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            kept = work()
            os.write(writing, str(status("VmHWM") - before - kept).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as answer:
        return int(answer.read())


def loaded(folder, **options):
    spec = describe(load_config(folder))
    stage_format = StageFormat(dtype=torch.bfloat16, max_tokens=64, **options)
    stage = load_stage(folder, spec, StageSlice.whole(spec), stage_format)
    # not state_dict(), which unpacks the weights of CPU layers: a copy of them all
    return sum(tensor.nbytes for tensor in (*stage.parameters(), *stage.buffers()))


def test_calibration_holds_one_block_at_a_time(tmp_path):
    """Eight blocks of 12.6 MB in fp32: less than two of them at a time."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1365,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=128,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    # In a process of its own that has calibrated once before, so that what was paged in does not
    # count; and with large tensors in mappings of their own, so that holes in its heap do not.
    program = [sys.executable, __file__, str(tmp_path)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert 12_600_000 <= int(ended.stdout.split()[-1]) <= 2 * 12_600_000


def calibrate(folder: str) -> None:
    spec = describe(load_config(folder))
    calibration = replace(make_calibration(folder, spec, "random", 16), token_ids=torch.arange(64))
    assert len(find_hot_columns(folder, spec, calibration)) == 8 * 4


def test_peak_memory_stays_below_twice_the_largest_tensor(folder, tmp_path):
    loaded(folder)  # what is paged in or allocated once is no part of it
    bound = 2 * LARGEST
    assert extra_bytes(lambda: loaded(folder)) <= bound
    assert extra_bytes(lambda: loaded(folder, int8=False)) <= bound
    assert extra_bytes(lambda: quantize(folder, tmp_path / "int8").run() and 0) <= bound
    assert extra_bytes(lambda: loaded(tmp_path / "int8")) <= bound


if __name__ == "__main__":
    torch.set_num_threads(1)
    calibrate(sys.argv[1])
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    calibrate(sys.argv[1])
    print(status("VmHWM") - before)
