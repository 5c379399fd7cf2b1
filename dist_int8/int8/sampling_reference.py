"""How a token is drawn: the specification, in plain torch.

Weights are integers, floor(2^40 * exp(x)) of x = (logit - largest) / temperature, so that sums over
a vocabulary are the same in any order, on any device. The random number is a function of seed and
position alone. Hence a sequence draws the same tokens on a CPU and on a GPU, in any batch, and
again when it is replayed. top_k, top_p and min_p are those of transformers' logits warpers, in
their order; tokens as probable as the last that is kept are kept too.

csrc/include/dist_int8/sampling.h has the same arithmetic for the kernels.
"""

import math

import torch
from torch import Tensor

SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "prompt_length",
)
"""Columns of `settings`, float64 [S, 8]: a row per slot."""

NOT_A_TOKEN = -1  # in place of a token whose logits are NaN
WEIGHT_BITS = 40
LEAST_EXPONENT = -28.0  # exp(-28) * 2^40 < 1
_WORD = 2**64 - 1


def sample_tokens(
    logits: Tensor, slots: Tensor, lengths: Tensor, settings: Tensor, seeds: Tensor
) -> Tensor:
    """Chooses a token for each row of logits; documented in `sampling`."""
    chosen = [
        _choose(row, _settings_of(settings[slot]), int(seeds[slot]), length)
        for row, slot, length in zip(logits, slots.tolist(), lengths.tolist(), strict=True)
    ]
    return torch.tensor(chosen, dtype=torch.int64, device=logits.device)


def _settings_of(row: Tensor) -> dict[str, float]:
    return dict(zip(SETTINGS, row.tolist(), strict=True))


def _choose(logits: Tensor, settings: dict[str, float], seed: int, position: int) -> int:
    largest = logits.max()  # a NaN counts as the largest
    if largest.isnan():
        return NOT_A_TOKEN
    if settings["temperature"] == 0:
        return int((logits == largest).nonzero()[0])
    if largest.isinf():
        return NOT_A_TOKEN
    temperature = torch.tensor(settings["temperature"], dtype=torch.float32, device=logits.device)
    weights = weigh((logits - largest) / temperature)
    kept = torch.ones_like(weights, dtype=torch.bool)
    k = int(settings["top_k"])
    if 0 < k < len(logits):
        kept &= logits >= logits.topk(k).values[-1]
    if settings["top_p"] < 1:
        kept &= logits >= _least_of_top_p(logits, weights * kept, settings["top_p"])
    kept &= weights >= math.ceil(settings["min_p"] * 2.0**WEIGHT_BITS)
    sums = (weights * kept).cumsum(0)
    place = random_bits(seed, position) * int(sums[-1]) >> 64  # 0 .. total-1
    return int((sums > place).nonzero()[0])


def _least_of_top_p(logits: Tensor, weights: Tensor, top_p: float) -> Tensor:
    """The least logit of the most probable tokens that reach total - floor((1 - top_p) * total)."""
    order = logits.argsort(descending=True)
    sums = weights[order].cumsum(0)
    total = int(sums[-1])
    goal = total - int((1.0 - top_p) * float(total))
    return logits[order][(sums >= goal).nonzero()[0]]


def weigh(x: Tensor) -> Tensor:
    """fp32 x <= 0 -> int64 floor(2^40 * exp(x)), 0 below LEAST_EXPONENT."""
    scaled = portable_exp(x.clamp(min=LEAST_EXPONENT)).double() * 2.0**WEIGHT_BITS
    return scaled.long()


def portable_exp(x: Tensor) -> Tensor:
    """exp of fp32 LEAST_EXPONENT <= x <= 0, each operation rounded by itself; 1 for 0.

    Reduction and polynomial of Cephes' expf (Moshier), within 2 ulp.
    """
    n = (x * 1.44269504088896341).round()
    r = x - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    y = (p * (r * r) + r) + 1.0
    return (y.view(torch.int32) + n.int() * 2**23).view(torch.float32)


def random_bits(seed: int, position: int) -> int:
    """64 random bits: the first word of Philox4x64-10 (Salmon et al. 2011).

    The counter is (position, 0, 0, 0), the key (seed, 0).
    """
    c0, c1, c2, c3 = position & _WORD, 0, 0, 0
    key0, key1 = seed & _WORD, 0
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1 = product1 >> 64 ^ c1 ^ key0, product1 & _WORD
        c2, c3 = product0 >> 64 ^ c3 ^ key1, product0 & _WORD
        key0 = key0 + 0x9E3779B97F4A7C15 & _WORD
        key1 = key1 + 0xBB67AE8584CAA73B & _WORD
    return c0


def penalize_logits(
    logits: Tensor, slots: Tensor, lengths: Tensor, settings: Tensor, history: Tensor
) -> None:
    """Lowers the logits of tokens that are in their sequences, in place; see `sampling`."""
    for row, slot, length in zip(logits, slots.tolist(), lengths.tolist(), strict=True):
        of_slot = _settings_of(settings[slot])
        tokens = history[slot, :length].long()
        answer = tokens[int(of_slot["prompt_length"]) :]
        repetition = torch.tensor(of_slot["repetition_penalty"], dtype=torch.float32)
        seen = tokens.unique()
        row[seen] = torch.where(row[seen] < 0, row[seen] * repetition, row[seen] / repetition)
        row[answer.unique()] -= torch.tensor(of_slot["presence_penalty"], dtype=torch.float32)
        frequency = torch.tensor(of_slot["frequency_penalty"], dtype=torch.float32)
        for token in answer.tolist():  # one subtraction per occurrence
            row[token] -= frequency
