"""Strided perplexity, agreement on the next token and KL divergence, window by window.

    tokens   0 1 2 3 4 5 6 7 8 9
    window 0 x x x x                  predicts 1 2 3 4
    window 1     x x x x              predicts 5 6        window = 4, stride = 2
    window 2         x x x x          predicts 7 8
    window 3             x x x        predicts 9

Every token but the first is predicted once, from at least window - stride + 1 tokens before it
wherever there are that many. Only the logits of one batch of windows are in memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Rows of logits processed at a time: few enough for the processor's cache.
_ROWS = 8


@dataclass(frozen=True)
class Window:
    """A window: tokens begin .. end - 1 are the input, tokens first .. end are predicted.

    Attributes:
        begin: position of the first input token.
        end: position of the last predicted token, one after the last input token.
        first: position of the first predicted token.
    """

    begin: int
    end: int
    first: int

    @property
    def num_targets(self) -> int:
        return self.end + 1 - self.first


def windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Divides a text into windows.

    Args:
        num_tokens: number of tokens of the text, at least 2.
        window: number of tokens that a model sees at once.
        stride: number of tokens from one window to the next; a smaller stride gives each predicted
            token more context.

    Raises:
        ValueError: the stride is not in 1 .. window, or the text is not longer than a window.
    """
    if window < 1:
        raise ValueError(f"eval: window must be at least 1 token, got {window}; write 1024")
    if not 1 <= stride <= window:
        raise ValueError(
            f"eval: stride must be 1 to the window of {window} tokens, got {stride}; a larger one "
            "would skip tokens"
        )
    if num_tokens <= window:
        raise ValueError(
            f"eval: text must be longer than a window of {window} tokens, got {num_tokens} tokens; "
            "take a longer text or a smaller --window"
        )
    found = [Window(0, window, 1)]
    while (last := found[-1]).end < num_tokens - 1:
        end = min(last.end + stride, num_tokens - 1)
        found.append(Window(last.begin + stride, end, last.end + 1))
    return found


@dataclass
class Scores:
    """Scores of one method, in lists with one entry per window.

    Attributes:
        num_targets: number of predicted tokens.
        loss: sum of their cross entropies, in nats.
        divergence: sum of KL(reference || method) over them, in nats; empty without a reference.
        agreeing: number of them whose most likely token is that of the reference; empty without a
            reference.
        seconds: seconds spent in the model, over all windows.
    """

    num_targets: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreeing: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        return _exp(self.mean_loss)

    @property
    def mean_loss(self) -> float:
        return sum(self.loss) / sum(self.num_targets)

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of the perplexity over the windows; None for a single one."""
        error = standard_error(self.loss, self.num_targets)
        return None if error is None else self.perplexity * error

    def change_percent(self, base: "Scores") -> tuple[float, float | None]:
        """Computes the change of perplexity against `base` and its standard error, in percent.

        The same windows were measured with both, so most of their spread cancels.
        """
        moved = [loss - of_base for loss, of_base in zip(self.loss, base.loss, strict=True)]
        ratio = _exp(sum(moved) / sum(self.num_targets))
        error = standard_error(moved, self.num_targets)
        return 100 * (ratio - 1), None if error is None else 100 * ratio * error

    @property
    def mean_divergence(self) -> tuple[float, float | None]:
        """KL divergence in nats per token, and its standard error over the windows."""
        mean = sum(self.divergence) / sum(self.num_targets)
        return mean, standard_error(self.divergence, self.num_targets)

    @property
    def agreement_percent(self) -> float:
        return 100 * sum(self.agreeing) / sum(self.num_targets)

    @torch.inference_mode()
    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        """Adds one window.

        Args:
            logits: logits of the method, fp32 [targets, vocab].
            targets: token ids of the text, int64 [targets].
            reference: log-probabilities of the reference, fp32 [targets, vocab].
        """
        loss = divergence = 0.0
        agreeing = 0
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            log_q = torch.log_softmax(logits[rows], dim=1)
            loss -= log_q.gather(1, targets[rows, None]).double().sum().item()
            if reference is not None:
                log_p = reference[rows]
                agreeing += int((log_p.argmax(1) == log_q.argmax(1)).sum())
                # a token of probability 0 contributes nothing, and 0 * inf would be NaN
                terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
                divergence += terms.sum(1).double().sum().item()
        self.num_targets.append(len(targets))
        self.loss.append(loss)
        if reference is not None:
            self.divergence.append(divergence)
            self.agreeing.append(agreeing)


@torch.inference_mode()
def log_probabilities_(logits: Tensor) -> Tensor:
    """Computes log_softmax of logits [..., vocab] in place."""
    rows = logits.view(-1, logits.shape[-1])
    for start in range(0, len(rows), _ROWS):
        rows[start : start + _ROWS] = torch.log_softmax(rows[start : start + _ROWS], dim=1)
    return logits


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Computes the standard error of sum(sums) / sum(counts); None for a single window.

    Windows may have different counts, so this is the standard error of a ratio estimator (Cochran
    1977, section 6.4); for equal counts it is the usual stdev / sqrt(n).
    """
    if len(sums) < 2:
        return None
    mean = sum(sums) / sum(counts)
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return math.sqrt(len(sums) / (len(sums) - 1) * squares) / sum(counts)


def _exp(mean_loss: float) -> float:
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
