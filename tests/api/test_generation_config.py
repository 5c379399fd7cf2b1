"""Answers with a GenerationConfig are those of transformers, for any stages and after a replay."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import dist_int8

OPTIONS = {"progress": False, "threads_per_stage": 1, "max_tokens": 96}
PROMPT = [72, 101, 108, 108, 111]
NUM_NEW = 12


@pytest.fixture(scope="module")
def theirs(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture(scope="module")
def ours(tiny_llama):
    with dist_int8.load(tiny_llama, devices=["cpu"], int8=False, **OPTIONS) as model:
        yield model


@pytest.fixture(scope="module")
def plain(theirs):
    """The greedy answer, whose tokens the fields below are about."""
    return generate(theirs, PROMPT, {})


def generate(model, prompt, fields):
    config = GenerationConfig(**{"max_new_tokens": NUM_NEW} | fields)
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=config
    )
    return output[0, len(prompt) :].tolist()


# field values from the greedy answer `a`
GREEDY = {
    "eos": lambda a: {"eos_token_id": a[3]},
    "several eos": lambda a: {"eos_token_id": [a[7], a[5]]},
    "max_length": lambda a: {"max_length": 9, "max_new_tokens": None},
    "max_length and max_new_tokens": lambda a: {"max_length": 9, "max_new_tokens": 6},
    "min_new_tokens": lambda a: {"eos_token_id": a[1], "min_new_tokens": 6},
    "min_length": lambda a: {"eos_token_id": a[1], "min_length": 9},
    "both minima": lambda a: {"eos_token_id": a[1], "min_length": 9, "min_new_tokens": 2},
    "suppress_tokens": lambda a: {"suppress_tokens": [a[0], a[2]]},
    "begin_suppress_tokens": lambda a: {"begin_suppress_tokens": [a[0]]},
    "forced_eos_token_id": lambda a: {"forced_eos_token_id": 7},
    "several forced_eos_token_id": lambda a: {"forced_eos_token_id": [9, 8]},
    "forced_bos_token_id": lambda a: {"forced_bos_token_id": 7},
    "bad_words_ids": lambda a: {"bad_words_ids": [[a[0]], [a[3], a[4]]], "eos_token_id": 5},
    "a bad word that is eos": lambda a: {"bad_words_ids": [[a[2]], [6]], "eos_token_id": a[2]},
    "sequence_bias": lambda a: {"sequence_bias": {(a[0],): -1e3, (5, 6): 2.0, (a[1], a[2]): -9.0}},
    "no_repeat_ngram_size": lambda a: {"no_repeat_ngram_size": 1},
    "bigrams": lambda a: {"no_repeat_ngram_size": 2, "sequence_bias": {(9,): 40.0, (8,): 39.0}},
    "repetition_penalty": lambda a: {"repetition_penalty": 1.7, "suppress_tokens": [a[0]]},
    "length penalty": lambda a: {
        "exponential_decay_length_penalty": (3, 2.5),
        "eos_token_id": 20,
    },
    "remove_invalid_values": lambda a: {"remove_invalid_values": True, "suppress_tokens": [a[1]]},
    "everything": lambda a: {
        "repetition_penalty": 1.3,
        "suppress_tokens": [a[0]],
        "begin_suppress_tokens": [a[1]],
        "bad_words_ids": [[a[2]]],
        "sequence_bias": {(a[3],): -2.0},
        "no_repeat_ngram_size": 3,
        "forced_eos_token_id": 4,
        "min_new_tokens": 4,
    },
}


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_answers_are_those_of_transformers(case, ours, theirs, plain):
    fields = GREEDY[case](plain)
    prompts = [PROMPT, PROMPT[:1]] if case == "forced_bos_token_id" else [PROMPT]
    expected = [generate(theirs, prompt, fields) for prompt in prompts]
    assert case in ("forced_bos_token_id", "remove_invalid_values") or expected != [plain]
    config = GenerationConfig(**{"max_new_tokens": NUM_NEW} | fields)
    answers = ours.generate(prompts, generation_config=config)
    assert [answer.token_ids for answer in answers] == expected


SAMPLED = [
    {"top_k": 3},
    {"top_p": 0.5},
    {"min_p": 0.2},
    {"top_h": 0.5},
    {"typical_p": 0.3},
    {"epsilon_cutoff": 0.03},
    {"eta_cutoff": 0.05},
    {"temperature": 0.5, "top_h": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.7},
]


@pytest.mark.parametrize("fields", SAMPLED, ids=lambda fields: "-".join(fields))
def test_what_is_sampled_is_among_the_tokens_of_transformers(fields, ours, theirs):
    fields = {"do_sample": True, "max_new_tokens": 1, "top_k": 0} | fields
    scores = theirs.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        generation_config=GenerationConfig(
            **fields, output_scores=True, return_dict_in_generate=True
        ),
    ).scores[0][0]
    probabilities = scores.softmax(-1)
    config = GenerationConfig(**fields)
    answers = ours.generate([PROMPT] * 60, generation_config=config, seed=1)
    drawn = {answer.token_ids[0] for answer in answers}
    assert drawn <= set(scores.isfinite().nonzero().flatten().tolist())
    assert {token for token, p in enumerate(probabilities.tolist()) if p > 0.2} <= drawn


SETTINGS = {
    "max_new_tokens": NUM_NEW,
    "min_new_tokens": 8,
    "no_repeat_ngram_size": 2,
    "min_p": 0.02,
}
SETTINGS |= {"temperature": 0.9, "seed": 3, "forced_eos_token_id": 4}


def many(plain):
    """Settings with every rule that depends on the position."""
    return SETTINGS | {
        "eos_token_id": [plain[0], plain[2]],
        "begin_suppress_tokens": [plain[1]],
        "bad_words_ids": [[plain[3], plain[4]]],
        "exponential_decay_length_penalty": (2, 1.2),
    }


def test_two_stages_and_batches_give_the_same_tokens(tiny_llama, ours, plain):
    settings = many(plain)
    prompts = [PROMPT, PROMPT[:1], PROMPT * 3]
    alone = [ours.generate([p], **settings | {"seed": 3 + i}) for i, p in enumerate(prompts)]
    with dist_int8.load(tiny_llama, devices=["cpu"] * 2, int8=False, **OPTIONS) as model:
        together = model.generate(prompts, **settings)
    assert [a.token_ids for a in together] == [answer.token_ids for (answer,) in alone]
    assert all(len(answer.token_ids) >= 8 for answer in together)  # of min_new_tokens


@pytest.mark.parametrize("num_before", [1, 3, 9])
def test_a_replay_gives_the_same_tokens(ours, plain, num_before):
    (expected,) = ours.generate([PROMPT], **many(plain))
    engine = ours._engine
    (request,) = ours._encoder.make_requests([PROMPT], ours._encoder.choose(None, many(plain)))
    engine.add([request])
    while len(request.token_ids) < num_before:
        engine.step()
    request.replay()  # as after a lost rank: prompt and answer so far are prefilled again
    while not request.ended:
        engine.step()
    assert request.token_ids == expected.token_ids


def test_ends_that_are_asked_for_are_named(ours, plain):
    ends = {"stop_token_ids": [plain[2]], "eos_token_id": plain[4], "max_new_tokens": 9}
    (stopped,) = ours.generate([PROMPT], **ends)
    first = plain.index(plain[2]) + 1
    assert (stopped.token_ids, stopped.finish_reason) == (plain[:first], "stop")
    (ended,) = ours.generate([PROMPT], eos_token_id=plain[4])
    assert ended.finish_reason == "eos" and ended.token_ids[-1] == plain[4]
    (ignored,) = ours.generate([PROMPT], eos_token_id=plain[4], ignore_eos=True, max_new_tokens=9)
    assert (ignored.token_ids, ignored.finish_reason) == (plain[:9], "length")
    (late,) = ours.generate([PROMPT], max_time=0.0, max_new_tokens=40)
    assert (late.token_ids, late.finish_reason) == (plain[:1], "time")
    (slow,) = ours.generate([PROMPT], max_time=600.0, max_new_tokens=9)
    assert (slow.token_ids, slow.finish_reason) == (plain[:9], "length")


def test_prompt_and_answer_fill_the_context_and_no_more(ours):
    for num_prompt_tokens in (95, 94, 90):
        (answer,) = ours.generate([[1] * num_prompt_tokens], max_new_tokens=50)
        assert len(answer.token_ids) == 96 - num_prompt_tokens and answer.finish_reason == "length"
    (forced,) = ours.generate([[1] * 90], max_new_tokens=50, forced_eos_token_id=3)
    assert forced.token_ids[-1] == 3 and len(forced.token_ids) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 5}, "max_length must be above the 5 tokens of prompt 0, got 5"),
        ({"suppress_tokens": [288]}, "suppress_tokens must be token ids below 288, got 288"),
        ({"sequence_bias": {(1, 999): -1.0}}, "sequence_bias must be token ids below 288, got 999"),
        ({"bad_words_ids": [[i] * 300 for i in range(9)]}, "most 2048 numbers together, got 2745"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens must be at most"),
        ({"sequence_bias": {(1,): float("nan")}}, "sequence_bias must be"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be non-empty"),
        ({"stop_token_ids": "5"}, "stop_token_ids must be an integer"),
        ({"num_beams": 2}, "num_beams must be a known setting"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_by_name(ours, settings, message):
    with pytest.raises(ValueError, match=message):
        ours.generate([PROMPT], **settings)


def copy_with(tiny_llama, folder, fields):
    """A copy of the model with another generation_config.json: fields, or text as it is."""
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    text = fields if isinstance(fields, str) else json.dumps(fields)
    (folder / "generation_config.json").write_text(text)
    return folder


def test_the_models_own_config_is_the_default(tiny_llama, tmp_path, theirs, ours, plain):
    own = {"max_new_tokens": 7, "suppress_tokens": [plain[0]], "eos_token_id": 287}
    folder = copy_with(tiny_llama, tmp_path, own | {"pad_token_id": 0, "chat_format": "x"})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = reference.generate(torch.tensor([PROMPT]))[0, len(PROMPT) :].tolist()
    with dist_int8.load(folder, devices=["cpu"], int8=False, **OPTIONS) as model:
        assert model.generate([PROMPT])[0].token_ids == expected and len(expected) == 7
        assert len(model.generate([PROMPT], max_new_tokens=3)[0].token_ids) == 3
        (other,) = model.generate([PROMPT], model_defaults=False, max_new_tokens=NUM_NEW)
        assert other.token_ids == plain
        config = GenerationConfig(suppress_tokens=[])
        assert model.generate([PROMPT], generation_config=config)[0].token_ids == plain[:7]


@pytest.mark.parametrize(
    ("own", "given"),
    [({"min_new_tokens": 9}, {"max_new_tokens": 3}), ({"max_new_tokens": 5}, {"max_length": 12})],
)
def test_lengths_beside_those_of_the_models_own_config(tiny_llama, tmp_path, own, given):
    folder = copy_with(tiny_llama, tmp_path, own | {"eos_token_id": 287, "pad_token_id": 0})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = reference.generate(torch.tensor([PROMPT]), **given)[0, len(PROMPT) :].tolist()
    with dist_int8.load(folder, devices=["cpu"], int8=False, **OPTIONS) as model:
        assert model.generate([PROMPT], **given)[0].token_ids == expected


def test_sampling_of_the_models_own_config(tiny_llama, tmp_path, ours, plain):
    folder = copy_with(tiny_llama, tmp_path, {"do_sample": True, "temperature": 1.5, "top_k": 0})
    with dist_int8.load(folder, devices=["cpu"], int8=False, **OPTIONS) as model:
        (sampled,) = model.generate([PROMPT], seed=1, max_new_tokens=NUM_NEW)
        expected = ours.generate([PROMPT], seed=1, max_new_tokens=NUM_NEW, temperature=1.5)
        assert sampled.token_ids == expected[0].token_ids != plain
        for greedy in ({"temperature": 0}, {"do_sample": False}):
            assert model.generate([PROMPT], max_new_tokens=NUM_NEW, **greedy)[0].token_ids == plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "generation_config.json: must be JSON"),
        ("version https://git-lfs.github.com/spec/v1", "generation_config.json: must be JSON"),
        ("[]", "must be a JSON object, got list"),
        (
            {"temperature": "hot"},
            "generation_config.json:temperature: temperature must be a number",
        ),
        ({"eos_token_id": "</s>"}, "eos_token_id: must be an integer or a list of integers"),
        ({"suppress_tokens": [1.5]}, "suppress_tokens must be an integer, got 1.5"),
    ],
)
def test_a_damaged_config_is_named_before_weights_are_read(tiny_llama, tmp_path, fields, message):
    folder = copy_with(tiny_llama, tmp_path, fields)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=message) as error:
        dist_int8.load(folder, devices=["cpu"], **OPTIONS)
    assert "\n" not in str(error.value)


def test_what_the_models_own_config_wants_and_cannot_have(tiny_llama, tmp_path, caplog):
    folder = copy_with(tiny_llama, tmp_path, {"num_beams": 4})
    with dist_int8.load(folder, devices=["cpu"], **OPTIONS) as model:
        assert "num_beams must be left out, got 4" in caplog.text
        with pytest.raises(ValueError, match=r"generation_config.json:num_beams.*model_defaults"):
            model.generate("abc")
        assert model.generate("abc", max_new_tokens=2, model_defaults=False)[0].token_ids


@pytest.mark.parametrize("nested", [False, True])
def test_end_tokens_come_from_config_json_where_the_other_has_none(tiny_llama, nested):
    from transformers import AutoConfig

    from dist_int8.api.prepare import _make_encoder
    from dist_int8.pipeline.microbatch import Limits

    config = AutoConfig.from_pretrained(tiny_llama)
    if nested:
        outer = type(config)(eos_token_id=None)
        outer.text_config = config
        config = outer
    limits = Limits(1, 96, 10, 64, 288)
    folder = tiny_llama.parent / "no-eos"
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text('{"pad_token_id": 0}')
    assert _make_encoder(folder, config, limits).eos_token_ids == {287}
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert _make_encoder(folder, config, limits).eos_token_ids == {5, 6}
