"""Tokens drawn on a GPU: the very ones of the CPU."""

import pytest
import torch

from dist_int8.int8 import ops
from dist_int8.int8.sampling_reference import SETTINGS

RULES = [
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 1, "top_p": 0.95},
    {"temperature": 30, "top_p": 0.5},
    {"temperature": 1, "top_k": 3000, "min_p": 1e-4},
    {"temperature": 0.01},
]
NEUTRAL = dict.fromkeys(SETTINGS, 0.0) | {"top_p": 1.0, "repetition_penalty": 1.0}


def table(rows):
    return torch.tensor(
        [[float((NEUTRAL | row)[name]) for name in SETTINGS] for row in rows]
    ).double()


@pytest.mark.parametrize("vocabulary", [1, 1000, 32_000, 128_256, 250_880])
@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0])
def test_tokens_are_those_of_the_cpu(device, vocabulary, scale):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = scale * torch.randn(len(RULES), vocabulary, generator=generator)
    logits[:, 1::3] = logits[:, 1::3].round(decimals=1)
    logits[1, vocabulary // 2] = float("nan")
    slots = torch.arange(len(RULES), dtype=torch.int32)
    args = (logits, slots, 5 * slots + 1, table(RULES), 2**50 + slots.long())
    expected = ops.sample_tokens(*args)
    assert torch.equal(ops.sample_tokens(*(tensor.to(device) for tensor in args)).cpu(), expected)


def test_penalties_are_those_of_the_cpu(device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5000, generator=generator)
    history = torch.randint(0, 5000, (6, 3000), generator=generator, dtype=torch.int32)
    rows = [
        {"repetition_penalty": 1 + i / 4, "presence_penalty": i / 3, "frequency_penalty": -i / 5}
        for i in range(6)
    ]
    settings = table([row | {"prompt_length": 400 * i} for i, row in enumerate(rows)])
    lengths = torch.tensor([3000, 1, 0, 1500, 2999, 2000], dtype=torch.int32)
    args = (torch.arange(6, dtype=torch.int32), lengths, settings, history)
    expected, got = logits.clone(), logits.to(device)
    ops.penalize_logits(expected, *args)
    ops.penalize_logits(got, *(tensor.to(device) for tensor in args))
    assert torch.equal(got.cpu(), expected)
