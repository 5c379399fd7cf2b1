"""Choosing the next tokens from rows of logits: compiled where the library has a kernel.

Where it has none, and as the specification, there is `sampling_reference`.
"""

import torch
from torch import Tensor

from dist_int8.int8 import sampling_reference
from dist_int8.int8.library import load
from dist_int8.int8.registry import has_kernel

_COMPILED = load()
_KERNELS = {
    device: _COMPILED and has_kernel("sample_tokens", device.upper()) for device in ("cpu", "cuda")
}


def sample_tokens(
    logits: Tensor, slots: Tensor, lengths: Tensor, settings: Tensor, seeds: Tensor
) -> Tensor:
    """Chooses a token for each row of logits, the same bits on every device and in every batch.

    With temperature 0 the first of the largest logits. Else a draw from softmax(logits /
    temperature), among the top_k most probable tokens (0: all), of these among the most probable
    that reach top_p together, of these among those with min_p times the largest probability or
    more, as transformers' warpers do it; tokens as probable as the last one kept are kept too. The
    draw is a function of seed and length alone.

    Args:
        logits: fp32 [E, V], V at most 2^22.
        slots: int32 [E], the slot of each row's sequence, in 0..S-1.
        lengths: int32 [E], tokens of each sequence so far.
        settings: float64 [S, 8], columns `sampling_reference.SETTINGS`.
        seeds: int64 [S], as 64 bits.

    Returns:
        int64 [E]; NOT_A_TOKEN where a logit is NaN or, for a draw, the largest is infinite.

    Raises:
        ValueError: shapes, dtypes and devices; a slot that is not there (on a GPU that gives
            NOT_A_TOKEN: looking would take a host read).
    """
    if _KERNELS.get(logits.device.type):
        kernel = torch.ops.dist_int8.sample_tokens.default
        tokens: Tensor = kernel(logits.contiguous(), slots, lengths, settings, seeds)
        return tokens
    return sampling_reference.sample_tokens(logits, slots, lengths, settings, seeds)


def penalize_logits(
    logits: Tensor, slots: Tensor, lengths: Tensor, settings: Tensor, history: Tensor
) -> None:
    """Lowers the logits of tokens that are in their sequences, in place; the same bits everywhere.

    A token of prompt or answer: positive logits are divided by repetition_penalty, negative ones
    multiplied with it (Keskar et al. 2019). A token of the answer: presence_penalty is subtracted
    once, then frequency_penalty once per occurrence (as in OpenAI's API).

    Args:
        logits: fp32 [E, V], contiguous.
        slots, lengths, settings: as of `sample_tokens`; lengths 0..L.
        history: int32 [S, L], tokens of each slot's sequence, in 0..V-1.

    Raises:
        ValueError: shapes, dtypes and devices; on CPUs slots, lengths and tokens out of range (on a
            GPU such rows and tokens are left alone).
    """
    if _KERNELS.get(logits.device.type):
        torch.ops.dist_int8.penalize_logits.default(logits, slots, lengths, settings, history)
    else:
        sampling_reference.penalize_logits(logits, slots, lengths, settings, history)
