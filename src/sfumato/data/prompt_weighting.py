"""Prompt weighting: (words) and [words] get more and less weight, with the syntax of AUTOMATIC1111 and sd-scripts.

`(x)` multiplies the weight of its content by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3; brackets
nest, 64 deep; deeper ones are plain text. A backslash escapes a bracket or a backslash. A bracket that is not closed
extends to the end; a closing bracket without an opening one is plain text. No weight is above 100 or below -100, which
no number of brackets reaches that anyone means: features stay finite in every precision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENING_BRACKETS = {")": "(", "]": "["}
# Possessive quantifiers: digits without end are read once.
MARK = re.compile(r"\\(?P<plain>[()\[\]\\])|:\s*+(?P<weight>[+-]?(?:\d++\.?\d*+|\.\d++))\s*+\)|(?P<bracket>[()\[\]])")
MAX_DEPTH = 64  # open brackets of a kind, so that the work grows with the text alone
MAX_WEIGHT = 100.0

WeightedText = tuple[tuple[str, float], ...]  # pieces of text, each with its weight


def parse_weights(text: str) -> WeightedText:
    """The text without brackets, in pieces of equal weight; ("", 1) for an empty text."""
    pieces: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the first piece inside each open bracket

    def append(words: str) -> None:
        if words:
            pieces.append(words)
            weights.append(1.0)

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
            scale(opened["("].pop(), limit_weight(float(mark["weight"])))
        elif bracket in opened and len(opened[bracket]) < MAX_DEPTH:
            opened[bracket].append(len(pieces))
        elif bracket in OPENING_BRACKETS and opened[OPENING_BRACKETS[bracket]]:
            scale(opened[OPENING_BRACKETS[bracket]].pop(), FACTORS[OPENING_BRACKETS[bracket]])
        else:
            append(mark[0])
    append(text[position:])
    for bracket, starts in opened.items():
        for start in starts:
            scale(start, FACTORS[bracket])
    return merge_pieces(pieces, [limit_weight(weight) for weight in weights])


def limit_weight(weight: float) -> float:
    return min(max(weight, -MAX_WEIGHT), MAX_WEIGHT)


def merge_pieces(pieces: Sequence[str], weights: Sequence[float]) -> WeightedText:
    """Adjacent pieces of equal weight as one."""
    merged: list[tuple[str, float]] = []
    for weight, group in groupby(zip(pieces, weights, strict=True), key=itemgetter(1)):
        merged.append(("".join(piece for piece, _ in group), weight))
    return tuple(merged) or (("", 1.0),)


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
