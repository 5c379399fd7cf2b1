"""Prompts as people have them are taken as transformers would, or refused by type."""

import array
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BatchEncoding

from dist_int8.api.prompt_list import list_prompt, list_prompts
from dist_int8.api.prompts import PromptEncoder
from dist_int8.config import GenerationSettings


class Text(str):
    """A text of another class."""


IDS = [5, 6, 7]
TWO = [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("abc", ["abc"]),
        (Text("abc"), ["abc"]),
        (["abc", Text("d"), IDS], ["abc", "d", IDS]),
        (np.array(["abc", "d"]), ["abc", "d"]),
        (np.str_("abc"), ["abc"]),
        (IDS, [IDS]),
        (tuple(IDS), [IDS]),
        (range(5, 8), [IDS]),
        (array.array("l", IDS), [IDS]),
        (np.array(IDS), [IDS]),
        (np.array(IDS, dtype=np.uint8), [IDS]),
        (torch.tensor(IDS), [IDS]),
        (torch.tensor(IDS, dtype=torch.int32), [IDS]),
        (list(np.array(IDS)), [IDS]),
        (list(torch.tensor(IDS)), [IDS]),
        (np.array(TWO), TWO),
        (torch.tensor(TWO), TWO),
        (np.array([[5], [6, 7]], dtype=object), None),
        ([np.array([5, 6]), torch.tensor([7, 8])], TWO),
        ([np.array([5, 6]), [7, np.int64(8)]], TWO),
        ([torch.tensor([[5, 6]]), torch.tensor([[7, 8]])], TWO),  # return_tensors, one by one
        ({"input_ids": IDS}, [IDS]),
        ({"input_ids": [IDS]}, [IDS]),
        ({"input_ids": torch.tensor(TWO)}, TWO),
        (BatchEncoding({"input_ids": np.array(TWO)}), TWO),
        ([{"input_ids": [5, 6]}, BatchEncoding({"input_ids": torch.tensor([[7, 8]])})], TWO),
        ({"input_ids": [[0, 5, 6], [7, 8, 9]], "attention_mask": [[0, 1, 1], [1, 1, 0]]}, TWO),
        ({"input_ids": [5, 6, 0], "attention_mask": torch.tensor([1, 1, 0])}, [[5, 6]]),
        ({"input_ids": [[5, 6]], "attention_mask": np.array([[True, True]])}, [[5, 6]]),
        ({"input_ids": [[5, 6]], "token_type_ids": [[0, 0]], "length": [2]}, [[5, 6]]),
        ({"input_ids": [[5, 6]], "attention_mask": None}, [[5, 6]]),
        ([], []),
        (np.array([], dtype=np.int64), []),
        ({"input_ids": []}, []),
        ([[]], [[]]),
        ([{"role": "user", "content": "a"}], [[{"role": "user", "content": "a"}]]),
        ([[{"role": "user", "content": "a"}], "b"], [[{"role": "user", "content": "a"}], "b"]),
    ],
)
def test_prompts_of_every_kind_are_listed(prompts, expected):
    expected = [[5], [6, 7]] if expected is None else expected
    found = list_prompts(prompts)
    assert found == expected
    for prompt in found:
        assert not isinstance(prompt, list) or all(type(i) in (int, dict) for i in prompt)
        assert not isinstance(prompt, str) or type(prompt) is str


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (b"abc", "prompts must be text, token ids or a list of either, got bytes"),
        (bytearray(b"abc"), "got bytearray"),
        (memoryview(b"abc"), "got memoryview"),
        ({5, 6}, "got set"),
        (frozenset({5}), "got frozenset"),
        (None, "got NoneType"),
        (5, "got int"),
        (0.5, "got float"),
        (Path("a.txt"), "got PosixPath"),
        ((i for i in IDS), "got generator"),
        (np.array(5), "got ndarray"),
        (torch.tensor(5), "got Tensor"),
        (object(), "got object"),
        ([b"abc"], "prompt 0 must be text or token ids, got bytes"),
        ([IDS, None], "prompt 1 must be text or token ids, got NoneType"),
        ([IDS, 5], "prompt 1 must be text or token ids, got 5"),
        (["a", {5}], "prompt 1 must be text or token ids, got set"),
        ([0.5], "prompt 0 must be text or token ids, got 0.5"),
        ([[5, [6]]], "prompt 0 must be token ids, or rows of them"),
        ({}, "got a dict with no keys"),
        ({"text": "a"}, "got a dict with text"),
        ({"role": "user", "content": "a"}, "put messages into a list"),
        ([{"text": "a"}], "prompt 0 must be text, token ids or a dict with input_ids"),
        ({"input_ids": [IDS], "inputs_embeds": 0}, "alone, got inputs_embeds"),
        ({"input_ids": [IDS], "position_ids": [IDS]}, "alone, got position_ids"),
        ({"input_ids": [IDS], "attention_mask": [[1]]}, "attention_mask must be 0 or 1"),
        ({"input_ids": [IDS], "attention_mask": [[1, 2, 1]]}, "attention_mask must be 0 or 1"),
        ({"input_ids": "abc"}, "input_ids must be token ids, or rows of them, got str"),
        ({"input_ids": None}, "input_ids must be token ids, or rows of them, got NoneType"),
    ],
)
def test_what_is_no_prompt_is_refused_by_type(prompts, message):
    with pytest.raises(ValueError, match=message) as error:
        list_prompts(prompts)
    assert str(error.value).startswith("generate: ")


@pytest.mark.parametrize("prompt", ["abc", IDS, np.array(IDS), {"input_ids": torch.tensor([IDS])}])
def test_one_prompt_is_listed_alone(prompt):
    assert list_prompt(prompt, 3) in ("abc", IDS)


@pytest.mark.parametrize("prompt", [TWO, np.array(TWO), {"input_ids": TWO}, {"input_ids": []}])
def test_several_are_not_one(prompt):
    with pytest.raises(ValueError, match="prompt 3 must be one prompt, got"):
        list_prompt(prompt, 3)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (np.array([0.5]), "prompt 0 must be text or token ids, got 0.5"),
        (np.array([[5.0, 6.0]]), "token ids of prompt 0 must be integers 0 to 287, got 5.0"),
        (torch.tensor([[1.5]]), "token ids of prompt 0 must be integers 0 to 287, got 1.5"),
        (torch.tensor([True, False]), "token ids of prompt 0 must be integers 0 to 287, got True"),
        ([True], "token ids of prompt 0 must be integers 0 to 287, got True"),
        ([np.array(["a", "b"])], "token ids of prompt 0 must be integers 0 to 287, got 'a'"),
        ([5, "a"], "token ids of prompt 0 must be integers 0 to 287, got 'a'"),
        ({"input_ids": [[5, 6]], "attention_mask": [[0, 0]]}, "must have at least one token"),
        ([[5], []], "prompt 1 must have at least one token"),
    ],
)
def test_token_ids_of_any_kind_are_checked(tiny_llama, prompts, message):
    encoder = PromptEncoder(tiny_llama, vocab_size=288, max_tokens=8)
    with pytest.raises(ValueError, match=message):
        encoder.make_requests(prompts, GenerationSettings())


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_returns_is_taken_as_it_is(tiny_llama, tensors, side):
    encoder = PromptEncoder(tiny_llama, vocab_size=288, max_tokens=32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, trust_remote_code=False)
    tokenizer.pad_token, tokenizer.padding_side = "<end>", side
    encoding = tokenizer(["Once upon", "a"], padding=True, return_tensors=tensors)
    requests = encoder.make_requests(encoding, GenerationSettings())
    assert [r.prompt_ids for r in requests] == tokenizer(["Once upon", "a"]).input_ids
    assert [encoder.show(r) for r in requests] == ["Once upon", "a"]


def test_logits_take_what_generate_takes(tiny_llama):
    encoder = PromptEncoder(tiny_llama, vocab_size=288, max_tokens=8)
    rows = [[5, 6], [7, 8]]
    same = (np.array(rows), torch.tensor(rows), [np.array([5, 6]), torch.tensor([7, 8])])
    for given in (rows, *same, {"input_ids": torch.tensor(rows)}):
        assert encoder.check_rows(given).tolist() == rows
        assert encoder.check_sequences(given) == rows
    with pytest.raises(ValueError, match="logits: input_ids: attention_mask must be 0 or 1"):
        encoder.check_rows({"input_ids": rows, "attention_mask": [[1], [1]]})
    with pytest.raises(ValueError, match="logits: input_ids must be integers"):
        encoder.check_rows({"input_ids": rows, "attention_mask": [[1, 0], [1, 1]]})
    for wrong in (5, "abc", [5, 6], ["abc"]):
        with pytest.raises(ValueError, match="logits: sequences must be lists of token ids"):
            encoder.check_sequences(wrong)
