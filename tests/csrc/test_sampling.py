"""The bodies of the CUDA kernels that choose tokens, in the emulator, against the specification."""

import subprocess

import numpy
import pytest
import torch

from dist_int8.int8 import sampling_reference
from dist_int8.int8.sampling_reference import SETTINGS


@pytest.fixture(scope="module")
def program(compile_program):
    return compile_program("sampling", sanitize=True)


def settings_row(**given):
    neutral = {name: 0.0 for name in SETTINGS} | {"top_p": 1.0, "repetition_penalty": 1.0}
    return [float((neutral | given)[name]) for name in SETTINGS]


def run(program, what, logits, settings, lengths=None, history=None):
    """Row i is of slot i, with seed 7 * i."""
    count, vocabulary = logits.shape
    slots = torch.arange(count, dtype=torch.int32)
    lengths = torch.arange(count, dtype=torch.int32) if lengths is None else lengths
    history = torch.zeros(count, 1, dtype=torch.int32) if history is None else history
    seeds = torch.arange(count) * 7
    settings = torch.tensor(settings, dtype=torch.float64)
    tensors = (logits, slots, lengths, settings, seeds, history)
    numbers = [count, vocabulary, count, history.shape[1]]
    done = subprocess.run(
        [program, what, *map(str, numbers)],
        input=b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    if what == "sample":
        expected = sampling_reference.sample_tokens(logits, slots, lengths, settings, seeds)
        got = torch.from_numpy(numpy.frombuffer(done.stdout, numpy.int64).copy())
    else:
        expected = logits.clone()
        sampling_reference.penalize_logits(expected, slots, lengths, settings, history)
        got = numpy.frombuffer(done.stdout, numpy.float32).copy()
        got = torch.from_numpy(got).view(logits.shape)
    assert torch.equal(got, expected), (got, expected)


RULES = [
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.01},
    {"temperature": 100, "top_p": 0.5},
    {"temperature": 1, "top_k": 1},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"temperature": 1, "top_k": 1500},
    {"temperature": 1, "top_p": 0.999, "min_p": 0.001},
    {"temperature": 2, "min_p": 0.3},
    {"temperature": 1, "top_p": 1e-9},
]


@pytest.mark.parametrize("vocabulary", [1, 31, 1024, 5003])
@pytest.mark.parametrize("scale", [0.0, 0.01, 4.0], ids=["equal", "flat", "usual"])
def test_tokens_equal_the_specification(program, vocabulary, scale):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = scale * torch.randn(len(RULES), vocabulary, generator=generator)
    logits[:, 1::3] = logits[:, 1::3].round(decimals=1)  # equal ones
    run(program, "sample", logits, [settings_row(**rule) for rule in RULES])


def test_infinite_logits_and_nan(program):
    logits = torch.linspace(-3, 3, 100).repeat(7, 1)
    logits[0, 5] = torch.nan
    logits[1, 6] = -torch.nan
    logits[2, 7] = torch.inf
    logits[3, :50] = -torch.inf
    logits[4] = -torch.inf
    logits[5, 8] = torch.inf
    logits[6, 3:] = -torch.inf
    sampled = settings_row(temperature=1, top_p=0.9, top_k=60)
    run(program, "sample", logits, [sampled] * 5 + [settings_row(), sampled])


def test_penalties_equal_the_specification(program):
    generator = torch.Generator().manual_seed(0)
    rows = [
        settings_row(),
        settings_row(repetition_penalty=1.3),
        settings_row(presence_penalty=0.7, prompt_length=10),
        settings_row(frequency_penalty=-0.3, prompt_length=500),
        settings_row(
            repetition_penalty=0.8, presence_penalty=1, frequency_penalty=0.1, prompt_length=3
        ),
    ]
    logits = torch.randn(len(rows), 50, generator=generator)
    history = torch.randint(0, 50, (len(rows), 700), generator=generator, dtype=torch.int32)
    lengths = torch.tensor([700, 650, 11, 600, 0], dtype=torch.int32)
    run(program, "penalize", logits, rows, lengths, history)
    lengths[4] = 444
    run(program, "penalize", logits, rows, lengths, history)
