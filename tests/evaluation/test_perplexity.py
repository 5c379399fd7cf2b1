"""Windows, and measures, against transformers' own loss and plain float64."""

import math
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_int8.evaluation.perplexity import (
    Scores,
    Window,
    log_probabilities_,
    standard_error,
    windows,
)


@pytest.mark.parametrize(
    ("num_tokens", "window", "stride"),
    [(10, 4, 2), (10, 4, 4), (9, 4, 3), (5, 4, 1), (100, 7, 5), (2, 1, 1), (1025, 1024, 1024)],
)
def test_every_token_but_the_first_is_predicted_once(num_tokens, window, stride):
    found = windows(num_tokens, window, stride)
    predicted = [t for place in found for t in range(place.first, place.end + 1)]
    assert predicted == list(range(1, num_tokens))
    assert sum(place.num_targets for place in found) == num_tokens - 1
    for place in found[1:]:
        assert 1 <= place.end - place.begin <= window
        assert place.first - place.begin >= window - stride + 1
    assert {place.end - place.begin for place in found[:-1]} <= {window}


def test_windows_match_the_module_docstring():
    assert windows(10, 4, 2) == [
        Window(0, 4, 1), Window(2, 6, 5), Window(4, 8, 7), Window(6, 9, 9)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_tokens", "window", "stride", "part"),
    [
        (4, 4, 4, "text must be longer than a window of 4 tokens, got 4"),
        (9, 4, 5, "stride must be 1 to the window of 4 tokens, got 5"),
        (9, 4, 0, "stride must be 1 to the window"),
        (9, 0, 1, "window must be at least 1"),
    ],
)
def test_impossible_windows_are_refused(num_tokens, window, stride, part):
    with pytest.raises(ValueError, match=part):
        windows(num_tokens, window, stride)


def test_scores_match_float64():
    torch.manual_seed(0)
    logits, other = torch.randn(2, 100, 50) * 3
    targets = torch.randint(50, (100,))
    scores = Scores()
    scores.add(logits[:70], targets[:70], log_probabilities_(other[:70].clone()))
    scores.add(logits[70:], targets[70:], log_probabilities_(other[70:].clone()))
    p, q = other.double().log_softmax(1), logits.double().log_softmax(1)
    losses = -q[torch.arange(100), targets]
    divergence = (p.exp() * (p - q)).sum(1)
    assert scores.mean_loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert scores.mean_divergence[0] == pytest.approx(divergence.mean().item(), rel=1e-5)
    assert scores.agreeing == [
        int((p.argmax(1) == q.argmax(1))[rows].sum()) for rows in (slice(70), slice(70, None))
    ]
    base = Scores()
    base.add(other[:70], targets[:70], None)
    base.add(other[70:], targets[70:], None)
    change, _ = scores.change_percent(base)
    ratio = scores.perplexity / base.perplexity
    assert change == pytest.approx(100 * (ratio - 1), rel=1e-6)


def test_a_model_against_itself_has_no_divergence():
    logits = torch.randn(40, 300) * 10
    scores = Scores()
    scores.add(logits, logits.argmax(1), log_probabilities_(logits.clone()))
    assert scores.mean_divergence[0] == 0.0 and scores.agreement_percent == 100.0
    assert scores.change_percent(scores)[0] == 0.0


def test_token_of_reference_probability_zero_adds_no_divergence():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    scores = Scores()
    scores.add(logits, torch.tensor([0]), log_probabilities_(logits.clone()))
    assert scores.mean_divergence[0] == 0.0 and scores.perplexity == pytest.approx(2.0)


def test_a_standard_error_of_equal_windows_is_the_usual_one():
    sums = [3.0, 5.0, 4.0, 9.0]
    expected = statistics.stdev(value / 10 for value in sums) / math.sqrt(4)
    assert standard_error(sums, [10] * 4) == pytest.approx(expected)
    assert standard_error([1.0], [3]) is None
    # one window twice as long: the same sums per token have no spread
    assert standard_error([2.0, 4.0], [10, 20]) == pytest.approx(0.0)


def test_a_single_window_is_transformers_own_loss(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokens = torch.randint(288, (60,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loss = model(tokens[None], labels=tokens[None]).loss.item()
        (place,) = windows(60, 59, 59)
        scores = Scores()
        logits = model(tokens[None, place.begin : place.end]).logits[0]
        scores.add(logits[place.first - 1 :], tokens[place.first :], None)
    assert scores.mean_loss == pytest.approx(loss, rel=1e-5)
