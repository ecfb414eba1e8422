"""Covering arrays: few rows in which every two values of different axes that can meet do meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import combinations, product

Row = dict[str, str]  # axis -> value
Value = tuple[str, str]  # axis, value
Pair = tuple[Value, Value]
Allowed = Callable[[Mapping[str, str]], bool]  # of a row, or of a part of one

STARTS = 8  # pairs that a row is tried from


def pairs_of(row: Mapping[str, str]) -> set[Pair]:
    return set(combinations(sorted(row.items()), 2))


def possible_pairs(axes: Mapping[str, Sequence[str]], allowed: Allowed) -> set[Pair]:
    """Every two values that some whole row can hold."""
    found: set[Pair] = set()
    for one, other in combinations(sorted(axes), 2):
        for pair in product(((one, value) for value in axes[one]), ((other, value) for value in axes[other])):
            if completed(dict(pair), axes, allowed, set(), {}) is not None:
                found.add(pair)
    return found


def completed(
    row: Row, axes: Mapping[str, Sequence[str]], allowed: Allowed, wanted: Set[Pair], often: Mapping[Value, int]
) -> Row | None:
    """The row with a value on every axis, each the one that meets most of the `wanted` pairs; None if nothing fits.

    often: in how many wanted pairs a value is, which decides between equals.
    """
    if not allowed(row):
        return None
    axis = next((axis for axis in axes if axis not in row), None)
    if axis is None:
        return row

    def gain(value: str) -> tuple[int, int]:
        mine = (axis, value)
        return sum((mine, each) in wanted or (each, mine) in wanted for each in row.items()), often.get(mine, 0)

    for value in sorted(axes[axis], key=gain, reverse=True):
        found = completed({**row, axis: value}, axes, allowed, wanted, often)
        if found is not None:
            return found
    return None


def covering_array(axes: Mapping[str, Sequence[str]], allowed: Allowed = lambda row: True) -> list[Row]:
    """Rows that hold every possible pair at least once; greedy, the same for the same axes.

    Each row starts from a pair that is still missing and is filled along several orders of the axes; the one that
    meets most counts.
    """
    missing, rows = possible_pairs(axes, allowed), list[Row]()
    names = sorted(axes, key=lambda name: -len(axes[name]))
    while missing:
        often = Counter(value for pair in missing for value in pair)
        starts = sorted(missing, key=lambda pair: (-often[pair[0]] - often[pair[1]], pair))[:STARTS]
        best, most = Row(), 0
        for start, turn in product(starts, range(len(names))):
            order = {name: axes[name] for name in (*names[turn:], *names[:turn])}
            row = completed(dict(start), order, allowed, missing, often)
            assert row is not None, "a pair is possible where a whole row holds it"
            met = len(pairs_of(row) & missing)
            if met > most:
                best, most = row, met
        rows.append({name: best[name] for name in axes})
        missing -= pairs_of(best)
    return rows
