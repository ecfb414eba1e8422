"""Prompt weighting: (words) and [words] get more and less weight, with the syntax of AUTOMATIC1111 and sd-scripts.

`(x)` multiplies the weight of its content by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3; brackets
nest. A backslash escapes a bracket or a backslash. A bracket that is not closed extends to the end; a closing bracket
without an opening one is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENING_BRACKETS = {")": "(", "]": "["}
MARK = re.compile(r"\\(?P<plain>[()\[\]\\])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<bracket>[()\[\]])")

WeightedText = tuple[tuple[str, float], ...]  # pieces of text, each with its weight


def parse_weights(text: str) -> WeightedText:
    """The text without brackets, in pieces of equal weight; ("", 1) for an empty text."""
    letters: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # positions at which the content of open brackets starts

    def append(words: str) -> None:
        letters.extend(words)
        weights.extend([1.0] * len(words))

    def scale(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    position = 0
    for mark in MARK.finditer(text):
        append(text[position : mark.start()])
        position = mark.end()
        bracket = mark["bracket"]
        if mark["plain"]:
            append(mark["plain"])
        elif mark["weight"] and opened["("]:
            scale(opened["("].pop(), float(mark["weight"]))
        elif bracket in opened:
            opened[bracket].append(len(letters))
        elif bracket and opened[OPENING_BRACKETS[bracket]]:
            scale(opened[OPENING_BRACKETS[bracket]].pop(), FACTORS[OPENING_BRACKETS[bracket]])
        else:
            append(mark[0])
    append(text[position:])
    for bracket, starts in opened.items():
        for start in starts:
            scale(start, FACTORS[bracket])
    return merge_letters(letters, weights)


def merge_letters(letters: Sequence[str], weights: Sequence[float]) -> WeightedText:
    """Merge adjacent letters of equal weight into one piece."""
    pieces: list[tuple[str, float]] = []
    for letter, weight in zip(letters, weights, strict=True):
        if pieces and pieces[-1][1] == weight:
            pieces[-1] = (pieces[-1][0] + letter, weight)
        else:
            pieces.append((letter, weight))
    return tuple(pieces) or (("", 1.0),)


def strip_weights(text: WeightedText) -> str:
    """The plain text, which is encoded."""
    return "".join(words for words, _ in text)


def has_weights(text: WeightedText) -> bool:
    return any(weight != 1.0 for _, weight in text)


def compute_token_weights(text: WeightedText, ends: Sequence[int]) -> list[float]:
    """The weight of each token of the plain text. ends: where each token ends in it; 0 for a token without text."""
    weights: list[float] = []  # of each letter
    for words, weight in text:
        weights += [weight] * len(words)
    return [weights[end - 1] if end else 1.0 for end in ends]
