"""Files of prompts and of answers: what is read, kept, dropped and refused."""

import json

import pytest

from dist_int8.cli.prompt_file import Answers, read_items

SAME = {"model": "m"}


def write(path, *lines):
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def items_of(tmp_path, *lines, **settings):
    return read_items(write(tmp_path / "in.jsonl", *lines), settings, SAME)


def test_lines_have_three_kinds_of_prompts_and_their_own_settings(tmp_path):
    text, ids, chat = items_of(
        tmp_path,
        '\ufeff{"prompt": "Größe", "max_new_tokens": 3, "stop": "\\n"}',
        "",
        '{"token_ids": [1, 2], "id": "b"}',
        '{"messages": [{"role": "user", "content": "hi"}], "seed": 7}',
        temperature=0.5,
    )
    assert [item.kind for item in (text, ids, chat)] == ["prompt", "token_ids", "messages"]
    assert [item.id for item in (text, ids, chat)] == [1, "b", 4]  # empty lines count as lines
    assert [item.index for item in (text, ids, chat)] == [0, 1, 2]
    assert text.content == "Größe" and text.settings.max_new_tokens == 3
    assert text.settings.stop == ["\n"] and text.settings.temperature == 0.5
    assert ids.content == [1, 2] and ids.settings.max_new_tokens == 64
    assert chat.settings.seed == 7 and chat.error is None


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line must be JSON in UTF-8"),
        (b'{"prompt": "\xff"}', "line must be JSON in UTF-8"),
        ("[" * 100_000, "line must be JSON in UTF-8"),
        ("3", "line must be an object, got int"),
        ('{"text": "x"}', "line must have one of prompt, token_ids, messages, got none"),
        ('{"prompt": "x", "token_ids": [1]}', "got prompt and token_ids"),
        ('{"prompt": 3}', "prompt must be text, got int"),
        ('{"token_ids": [1, true]}', "token_ids must be a list of integers"),
        ('{"token_ids": "12"}', "token_ids must be a list of integers, got str"),
        ('{"messages": []}', "messages must be a list of objects"),
        ('{"prompt": "x", "id": 1.5}', "id must be text or an integer, got 1.5"),
        ('{"prompt": "x", "id": "\\ud800"}', "id must be valid text"),
        ('{"prompt": "x", "temperature": -1}', "temperature must be at least 0"),
        ('{"prompt": "x", "temperature": NaN}', "temperature must be"),
        ('{"prompt": "x", "temprature": 1}', "did you mean temperature?"),
    ],
)
def test_a_bad_line_gets_an_error_and_the_others_are_read(tmp_path, line, part):
    first, bad, last = items_of(tmp_path, '{"prompt": "a"}', line, '{"prompt": "b"}')
    assert first.error is None and last.error is None
    assert part in bad.error and "in.jsonl:2" in bad.error and bad.error.count("\n") == 0


def test_missing_and_empty_files_and_repeated_ids_are_refused(tmp_path):
    with pytest.raises(ValueError, match="input must be a file of JSON lines, got No such file"):
        read_items(tmp_path / "none", {}, SAME)
    with pytest.raises(ValueError, match="input must have at least one line"):
        items_of(tmp_path, "", "  ")
    with pytest.raises(ValueError, match=r"in.jsonl:3: id must differ .*, got 'a' as in line 1"):
        items_of(tmp_path, *(f'{{"prompt": "x", "id": "{name}"}}' for name in "aba"))


def answered(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_second_run_continues_after_a_kill(tmp_path):
    items = items_of(tmp_path, *(f'{{"prompt": "{i}", "id": "{i}"}}' for i in range(4)))
    path = tmp_path / "out.jsonl"
    with Answers(path, items) as answers:
        assert answers.done == set()
        answers.add(items[2], text="two", token_ids=[2], finish_reason="eos")
        assert answered(path)[0]["id"] == "2"  # there at once
        answers.add(items[0], error="bad")
        answers.add(items[1], text="one", token_ids=[1], finish_reason="eos")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])  # killed in the middle of a line
    with Answers(path, items) as answers:
        assert answers.done == {"1", "2"}  # the error is tried again
        answers.add(items[0], text="now", token_ids=[0], finish_reason="eos")
    assert [line["id"] for line in answered(path)] == ["2", "1", "0"]
    assert answered(path)[0] == {
        "id": "2",
        "text": "two",
        "token_ids": [2],
        "finish_reason": "eos",
        "request": items[2].fingerprint,
    }


def test_every_cut_of_the_file_can_be_continued(tmp_path):
    items = items_of(tmp_path, '{"prompt": "a"}', '{"prompt": "b"}')
    path = tmp_path / "out.jsonl"
    with Answers(path, items) as answers:
        for item in items:
            answers.add(item, text="é", token_ids=[1], finish_reason="eos")
    whole = path.read_bytes()
    lengths = [len(line) for line in whole.splitlines(keepends=True)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with Answers(path, items) as answers:
            assert len(answers.done) == (size >= lengths[0]) + (size >= sum(lengths))


@pytest.mark.parametrize(
    ("changed", "settings", "same"),
    [
        ('{"prompt": "b"}', {}, SAME),
        ('{"prompt": "a"}', {"max_new_tokens": 5}, SAME),
        ('{"prompt": "a"}', {}, {"model": "other"}),
        ('{"prompt": "a", "seed": 1}', {}, SAME),
    ],
)
def test_answers_to_something_else_are_refused(tmp_path, changed, settings, same):
    items = items_of(tmp_path, '{"prompt": "a"}')
    with Answers(tmp_path / "out.jsonl", items) as answers:
        answers.add(items[0], text="", token_ids=[], finish_reason="eos")
    other = read_items(write(tmp_path / "in.jsonl", changed), settings, same)
    with pytest.raises(ValueError, match=r"out.jsonl:1: output must hold answers .* of id 1;"):
        Answers(tmp_path / "out.jsonl", other)
    with Answers(tmp_path / "out.jsonl", items) as answers:  # and it is as it was
        assert answers.done == {1}


@pytest.mark.parametrize("line", ["hello", "[]", "3", "{}", '{"id": [], "request": "x"}'])
def test_a_file_without_answers_is_refused_and_kept(tmp_path, line):
    items = items_of(tmp_path, '{"prompt": "a"}')
    path = write(tmp_path / "out.jsonl", line)
    with pytest.raises(ValueError, match=r"out.jsonl:1: output must hold answers .* something"):
        Answers(path, items)
    assert path.read_text() == line + "\n"


def test_an_answer_to_an_unknown_id_is_refused(tmp_path):
    items = items_of(tmp_path, '{"prompt": "a"}')
    path = write(tmp_path / "out.jsonl", '{"id": "z", "text": "", "request": "x"}')
    with pytest.raises(ValueError, match="got id 'z', which is not in the input"):
        Answers(path, items)


def test_a_second_run_cannot_write_to_the_same_file(tmp_path):
    items = items_of(tmp_path, '{"prompt": "a"}')
    path = tmp_path / "out.jsonl"
    path.write_text("torn")  # so that the first run replaces the file
    with Answers(path, items), pytest.raises(ValueError, match="must be written by one run"):
        Answers(path, items)
    with pytest.raises(ValueError, match="output must be a file that can be written"):
        Answers(tmp_path / "no" / "out.jsonl", items)
