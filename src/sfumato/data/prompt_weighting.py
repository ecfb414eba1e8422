"""Emphasis in prompts and captions: (words) and [words] count more and less, as the field writes it.

`(x)` multiplies the weight of what it holds by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3; brackets
nest, and each kind closes its own. A backslash makes a bracket or another backslash plain text. A bracket that is never
closed reaches to the end, one that closes nothing is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENS = {")": "(", "]": "["}
MARK = re.compile(r"\\(?P<plain>[()\[\]\\])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<bracket>[()\[\]])")

Pieces = tuple[tuple[str, float], ...]  # text and its weight


def parse(text: str) -> Pieces:
    """The text without its marks, in pieces of one weight; ("", 1) for an empty text."""
    letters: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where what they hold begins

    def take(words: str) -> None:
        letters.extend(words)
        weights.extend([1.0] * len(words))

    def scale(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    place = 0
    for mark in MARK.finditer(text):
        take(text[place : mark.start()])
        place = mark.end()
        bracket = mark["bracket"]
        if mark["plain"]:
            take(mark["plain"])
        elif mark["weight"] and opened["("]:
            scale(opened["("].pop(), float(mark["weight"]))
        elif bracket in opened:
            opened[bracket].append(len(letters))
        elif bracket and opened[OPENS[bracket]]:
            scale(opened[OPENS[bracket]].pop(), FACTORS[OPENS[bracket]])
        else:
            take(mark[0])
    take(text[place:])
    for bracket, starts in opened.items():
        for start in starts:
            scale(start, FACTORS[bracket])
    return joined(letters, weights)


def joined(letters: Sequence[str], weights: Sequence[float]) -> Pieces:
    """Neighbouring letters of one weight become one piece."""
    pieces: list[tuple[str, float]] = []
    for letter, weight in zip(letters, weights, strict=True):
        if pieces and pieces[-1][1] == weight:
            pieces[-1] = (pieces[-1][0] + letter, weight)
        else:
            pieces.append((letter, weight))
    return tuple(pieces) or (("", 1.0),)


def plain(pieces: Pieces) -> str:
    """The text that is encoded."""
    return "".join(words for words, _ in pieces)


def emphasised(pieces: Pieces) -> bool:
    return any(weight != 1.0 for _, weight in pieces)


def of_tokens(pieces: Pieces, ends: Sequence[int]) -> list[float]:
    """The weight of each token of the plain text, from the place in it where the token ends; 0: no text, weight 1."""
    weights = [weight for words, weight in pieces for _ in words]
    return [weights[end - 1] if end else 1.0 for end in ends]
