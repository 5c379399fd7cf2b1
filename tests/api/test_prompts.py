"""Prompts of every kind become checked token ids and requests, without a loaded model."""

import pytest
import torch

from dist_int8.api.prompts import PromptEncoder
from dist_int8.config import GenerationSettings

SETTINGS = GenerationSettings(seed=7)


@pytest.fixture(scope="module")
def encoder(tiny_llama):
    return PromptEncoder(tiny_llama, vocab_size=288, max_tokens=8)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (([5, 6], (7, 8)), [[5, 6], [7, 8]]),
        (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        (torch.tensor([5, 6]), [[5, 6]]),
        ([], []),
    ],
)
def test_token_ids_are_one_prompt_or_many(encoder, prompts, expected):
    requests = encoder.make_requests(prompts, SETTINGS)
    assert [request.prompt_ids for request in requests] == expected


def test_text_is_tokenized(encoder):
    (single,) = encoder.make_requests("abc", SETTINGS)
    first, second = encoder.make_requests(["abc", "de"], SETTINGS)
    assert single.prompt_ids == first.prompt_ids == encoder.tokenizer("abc").input_ids
    assert encoder.show(second) == "de"


def test_prompt_i_samples_with_seed_plus_i(encoder):
    seeds = [request.seed for request in encoder.make_requests([[1], [1]], SETTINGS)]
    assert seeds == [7, 8]
    last = GenerationSettings(seed=2**63 - 1)
    assert [request.seed for request in encoder.make_requests([[1], [1]], last)] == [2**63 - 1, 0]


def test_without_a_seed_one_is_drawn_for_the_whole_call(encoder):
    first, second = encoder.make_requests([[1], [1]], GenerationSettings())
    (other,) = encoder.make_requests([[1]], GenerationSettings())
    assert second.seed == first.seed + 1 and other.seed != first.seed


def test_without_a_tokenizer_only_token_ids_are_accepted(tmp_path):
    encoder = PromptEncoder(tmp_path, vocab_size=288, max_tokens=8)
    (request,) = encoder.make_requests([1, 2], SETTINGS)
    assert encoder.tokenizer is None and encoder.show(request) == ""
    with pytest.raises(ValueError, match=r"prompts must be token ids, got text, and .* tokenizer"):
        encoder.make_requests("abc", SETTINGS)
    with pytest.raises(ValueError, match=r"stop must be left out where there is no tokenizer"):
        encoder.make_requests([1, 2], SETTINGS.model_copy(update={"stop": ["x"]}))


def test_a_prompt_leaves_room_for_a_token_and_logits_need_none(encoder):
    encoder.make_request([1] * 7, SETTINGS)
    with pytest.raises(ValueError, match=r"generate: prompt 3 must be at most 7 tokens long"):
        encoder.make_request([1] * 8, SETTINGS, index=3)
    assert encoder.check_sequences([[1] * 8, (2,)]) == [[1] * 8, [2]]
    with pytest.raises(ValueError, match=r"logits: prompt 1 must be at most 8 tokens long"):
        encoder.check_sequences([[1], [1] * 9])


@pytest.mark.parametrize("token_id", [288, -1, 1.0, "a", True])
def test_invalid_token_ids_are_named(encoder, token_id):
    with pytest.raises(ValueError, match="token ids of prompt 0 must be integers 0 to 287, got"):
        encoder.make_requests([[1, token_id]], SETTINGS)


@pytest.mark.parametrize("prompts", [b"hi", {"prompt": "x"}, 5, None, [b"hi"], [{"prompt": "x"}]])
def test_what_is_neither_text_nor_token_ids_is_refused(encoder, prompts):
    with pytest.raises(ValueError, match=r"generate: prompts? .*must be text"):
        encoder.make_requests(prompts, SETTINGS)


@pytest.mark.parametrize("input_ids", [[1, 2], [[1, 2], [3]], [[]], [[0.5]], "ab", None])
def test_logits_take_a_rectangle_of_integers(encoder, input_ids):
    with pytest.raises(ValueError, match="logits: input_ids must be integers"):
        encoder.check_rows(input_ids)
