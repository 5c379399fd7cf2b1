r"""Escapes of --stop: what a shell user writes for a newline."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_int8.cli import app
from dist_int8.cli.escapes import read_escapes


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"\n\nUser:", "\n\nUser:"),
        (r"a\tb\rc", "a\tb\rc"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        (r"\end{document}", r"\end{document}"),
        ("\\", "\\"),
        (r"\u00e9", "é"),
        (r"\ud83d\ude00", "😀"),
        (r"\U0001F600", "😀"),
        ("Größe 😀\n", "Größe 😀\n"),
    ],
)
def test_what_is_typed_is_what_is_meant(typed, meant):
    assert read_escapes(typed, "here") == meant


@pytest.mark.parametrize("typed", [r"\u12", r"\uzzzz", r"\ud83d", r"\U00110000", r"\u"])
def test_half_an_escape_is_refused(typed):
    with pytest.raises(ValueError, match=r"here must be text in which \\uXXXX names a character"):
        read_escapes(typed, "here")


@given(st.text())
def test_a_doubled_backslash_gives_any_text_back(text):
    assert read_escapes(text.replace("\\", "\\\\"), "here") == text


def test_half_an_escape_is_one_line_of_the_command(capsys):
    assert app.run(["generate", "--stop", r"\u12"]) == 2
    assert "--stop must be text in which" in capsys.readouterr().err
