"""Prompt weighting: the syntax by its documented examples and by properties."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.data.prompt_weighting import compute_token_weights, parse_weights, strip_weights


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", [("", 1)]),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("((very)) [less] [[least]]", [("very", 1.21), (" ", 1), ("less", 1 / 1.1), (" ", 1), ("least", 1 / 1.21)]),
        ("a (big:1.5) (small:.5) (odd: 2 )", [("a ", 1), ("big", 1.5), (" ", 1), ("small", 0.5), (" ", 1), ("odd", 2)]),
        ("(a (b:2):1.5)", [("a ", 1.5), ("b", 3)]),
        ("(a [b] c)", [("a ", 1.1), ("b", 1), (" c", 1.1)]),
        (r"\(literal\] \\ \[x", [(r"(literal] \ [x", 1)]),
        (r"c:\dir (a\):1.3)", [("c:\\dir ", 1), ("a)", 1.3)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [b (c", [("a ", 1), ("b ", 1 / 1.1), ("c", 1)]),
        ("a) b] c", [("a) b] c", 1)]),
        ("(a] b)", [("a] b", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("[a:1.5)", [("a:1.5)", 1 / 1.1)]),
        ("time 12:30) x", [("time 12:30) x", 1)]),
        ("(time 12:30, b:1.2)", [("time 12:30, b", 1.2)]),
        ("(a:1.5:2)", [("a:1.5", 2)]),
        ("()", [("", 1)]),
        ("(a)(b)", [("ab", 1.1)]),
    ],
)
def test_examples(text: str, pieces: list[tuple[str, float]]) -> None:
    found = parse_weights(text)
    assert [words for words, _ in found] == [words for words, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@given(st.text(st.sampled_from("ab ()[]:1.\\"), max_size=20))
def test_pieces_are_whole(text: str) -> None:
    """Neighbours differ in weight, none is empty but that of an empty text, and letters are never lost."""
    pieces = parse_weights(text)
    assert all(first[1] != second[1] for first, second in pairwise(pieces))
    assert all(words for words, _ in pieces) or pieces == (("", 1.0),)
    assert strip_weights(pieces).count("a") == text.count("a")


@given(st.text(st.characters(exclude_characters="()[]\\"), max_size=20))
def test_text_without_marks_is_itself(text: str) -> None:
    assert parse_weights(text) == ((text, 1.0),)


@given(st.text(max_size=20))
def test_escaping_keeps_any_text(text: str) -> None:
    escaped = "".join("\\" + letter if letter in "()[]\\" else letter for letter in text)
    assert parse_weights(escaped) == ((text, 1.0),)


def test_weights_of_tokens() -> None:
    """By the last letter that belongs to a token; tokens without text, as the end, count 1."""
    pieces = parse_weights("a (red:2) cup")
    assert strip_weights(pieces) == "a red cup"
    assert compute_token_weights(pieces, [1, 5, 9, 0]) == [1, 2, 1, 1]


def test_brackets_deeper_than_64_are_plain_text() -> None:
    pieces = parse_weights("(" * 70 + "x" + ")" * 70)
    assert pieces == (("(" * 6 + "x", 100.0), (")" * 6, 1.0))  # 1.1 ** 64 is above 100
    assert parse_weights("(" * 20 + "x" + ")" * 20) == (("x", pytest.approx(1.1**20)),)


@pytest.mark.parametrize(
    ("text", "weight"), [("(x:1e300)", 1.0), ("(x:" + "9" * 400 + ")", 100.0), ("(x:-500)", -100.0), ("[(x:0)", 0.0)]
)
def test_weights_stay_finite(text: str, weight: float) -> None:
    """1e300 is no weight of the syntax: digits and a point alone are."""
    pieces = parse_weights(text)
    assert max(pieces, key=lambda piece: abs(piece[1]))[1] == (weight if weight != 1.0 else pytest.approx(1.1))


@pytest.mark.parametrize("unit", ["(", "[(", "(a:", "a (b) ", ":" + "9" * 50, "\\(", "x)", "([)]"])
def test_the_work_grows_with_the_text_alone(unit: str) -> None:
    """Ten times the text is ten times the time; a square would be a hundred."""
    seconds: list[float] = []
    for length in (20_000, 200_000):
        text = (unit * length)[:length]
        start = time.process_time()
        parse_weights(text)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 40 * max(seconds[0], 0.005)
