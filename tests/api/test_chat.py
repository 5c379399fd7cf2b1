"""Chats become the text that the template of transformers renders, or are refused in one line."""

import shutil

import pytest
from transformers import AutoTokenizer

import dist_int8
from dist_int8.api.prompts import PromptEncoder
from dist_int8.config import GenerationSettings

CHATML = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{{ raise_exception('Only\nusers and assistants') }}"
HELLO = [{"role": "user", "content": "Hello"}]
SETTINGS = GenerationSettings(seed=1)


def copy_with_template(tiny_llama, folder, template):
    """The model with a chat template, and a tokenizer that puts <bos> before every text."""
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, trust_remote_code=False)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[bos])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return copy_with_template(tiny_llama, tmp_path_factory.mktemp("chat"), CHATML)


@pytest.fixture(scope="module")
def encoder(folder):
    return PromptEncoder(folder, vocab_size=288, max_tokens=96)


def ids_of(encoder, prompts):
    return [request.prompt_ids for request in encoder.make_requests(prompts, SETTINGS)]


def test_a_chat_is_the_text_of_the_template(encoder):
    template = encoder.tokenizer.apply_chat_template
    expected = template(HELLO, add_generation_prompt=True, tokenize=True, return_dict=False)
    text = template(HELLO, add_generation_prompt=True, tokenize=False)
    (request,) = encoder.make_requests(HELLO, SETTINGS)
    assert request.prompt_ids == expected and encoder.show(request) == text
    assert expected.count(encoder.tokenizer.bos_token_id) == 1
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert ids_of(encoder, [HELLO, system, "a"])[0] == expected
    assert ids_of(encoder, [HELLO] * 2) == [expected] * 2
    assert encoder.make_request(HELLO, SETTINGS).prompt_ids == expected


@pytest.mark.parametrize("options", [{}, {"return_dict": False}, {"return_tensors": "pt"}])
def test_what_apply_chat_template_returns_is_taken_as_it_is(encoder, options):
    encoding = encoder.tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, tokenize=True, **options
    )
    assert ids_of(encoder, encoding) == ids_of(encoder, HELLO)


def test_a_rendered_chat_gets_no_second_bos(encoder):
    bos = encoder.tokenizer.bos_token_id
    text = encoder.tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    (request,) = encoder.make_requests(text, SETTINGS)
    assert request.prompt_ids == ids_of(encoder, HELLO)[0] and request.prompt == text
    assert ids_of(encoder, "abc") == [encoder.tokenizer("abc").input_ids]
    assert ids_of(encoder, "abc")[0][0] == bos


def test_parts_of_text_are_one_text(encoder):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chat = [{"role": "user", "content": parts}]
    assert ids_of(encoder, chat) == ids_of(encoder, [{"role": "user", "content": "Hel\nlo"}])


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ({"role": 5, "content": "a"}, "message 1 of prompt 0 must be a dict with a role .* got 5"),
        ({"content": "a"}, "must be a dict with a role and a content, got None"),
        ("a", "must be a dict with a role and a content, got str"),
        ({"role": "user"}, "content must be text, got NoneType"),
        ({"role": "user", "content": 5}, "content must be text, got int"),
        ({"role": "user", "content": [{"type": "image"}]}, "must be of type text, got image"),
        ({"role": "user", "content": "\udcff"}, "prompt 0 must be valid text"),
    ],
)
def test_messages_that_are_none_are_refused_by_name(encoder, message, part):
    with pytest.raises(ValueError, match=part) as error:
        encoder.make_requests([*HELLO, message], SETTINGS)
    assert "\n" not in str(error.value)


def test_a_role_that_is_not_usual_is_warned_of(encoder, caplog):
    ids_of(encoder, [{"role": "usr", "content": "a"}])
    assert "role is usually one of" in caplog.text and "got 'usr'" in caplog.text


def test_no_template_and_one_that_refuses(tiny_llama, tmp_path):
    encoder = PromptEncoder(tiny_llama, vocab_size=288, max_tokens=96)
    with pytest.raises(ValueError, match="must have a chat template for the messages of prompt 0"):
        encoder.make_requests(HELLO, SETTINGS)
    strict = copy_with_template(tiny_llama, tmp_path, STRICT)
    encoder = PromptEncoder(strict, vocab_size=288, max_tokens=96)
    with pytest.raises(ValueError, match=r"must fit the chat template, got Only users and") as e:
        encoder.make_requests(HELLO, SETTINGS)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("template", ["{% broken", "{{ messages[0] "])
def test_a_damaged_template_is_not_the_fault_of_the_messages(tiny_llama, tmp_path, template):
    encoder = PromptEncoder(copy_with_template(tiny_llama, tmp_path, template), 288, 96)
    with pytest.raises(ValueError, match=r"the chat template in .* must be a template of Jinja"):
        encoder.make_requests(HELLO, SETTINGS)


def test_a_template_runs_in_a_sandbox(tiny_llama, tmp_path):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    encoder = PromptEncoder(copy_with_template(tiny_llama, tmp_path, template), 288, 96)
    with pytest.raises(ValueError, match=r"must fit the chat template, got .*unsafe"):
        encoder.make_requests(HELLO, SETTINGS)


def test_generate_answers_a_chat(folder, encoder):
    options = {"progress": False, "threads_per_stage": 1, "max_tokens": 96}
    with dist_int8.load(folder, devices=["cpu"], **options) as model:
        (answer,) = model.generate(HELLO, max_new_tokens=4)
        (same,) = model.generate(ids_of(encoder, HELLO), max_new_tokens=4)
    assert answer.token_ids == same.token_ids
    assert answer.prompt == "<bos><user>Hello</s><assistant>"
