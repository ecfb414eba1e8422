"""Covering arrays: few rows that hold every possible pair of values of different axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import combinations, product

Row = dict[str, str]  # axis -> value
Value = tuple[str, str]  # axis, value
Pair = tuple[Value, Value]
Allowed = Callable[[Mapping[str, str]], bool]  # of a row, or of a part of one

STARTS = 8  # pairs that a row is tried from


def list_pairs(row: Mapping[str, str]) -> set[Pair]:
    return set(combinations(sorted(row.items()), 2))


def list_possible_pairs(axes: Mapping[str, Sequence[str]], allowed: Allowed) -> set[Pair]:
    """Every two values that a complete row can hold."""
    pairs: set[Pair] = set()
    for one, other in combinations(sorted(axes), 2):
        for first, second in product(axes[one], axes[other]):
            pair = (one, first), (other, second)
            if complete_row(dict(pair), axes, allowed, set(), {}) is not None:
                pairs.add(pair)
    return pairs


def complete_row(
    row: Row, axes: Mapping[str, Sequence[str]], allowed: Allowed, missing: Set[Pair], counts: Mapping[Value, int]
) -> Row | None:
    """The row with a value on every axis, each the one that covers most `missing` pairs; None if no value is allowed.

    counts: of the missing pairs of each value, which decide between equals.
    """
    if not allowed(row):
        return None
    axis = next((axis for axis in axes if axis not in row), None)
    if axis is None:
        return row

    def gain(value: str) -> tuple[int, int]:
        new = (axis, value)
        return sum((new, old) in missing or (old, new) in missing for old in row.items()), counts.get(new, 0)

    for value in sorted(axes[axis], key=gain, reverse=True):
        complete = complete_row({**row, axis: value}, axes, allowed, missing, counts)
        if complete is not None:
            return complete
    return None


def make_covering_array(axes: Mapping[str, Sequence[str]], allowed: Allowed = lambda row: True) -> list[Row]:
    """Rows that hold every possible pair at least once; greedy, the same for the same axes.

    Each row starts from a pair that is still missing and is completed along several orders of the axes; the one that
    covers most is used.
    """
    missing, rows = list_possible_pairs(axes, allowed), list[Row]()
    names = sorted(axes, key=lambda name: -len(axes[name]))
    while missing:
        counts = Counter(value for pair in missing for value in pair)
        starts = sorted(missing, key=lambda pair: (-counts[pair[0]] - counts[pair[1]], pair))[:STARTS]
        best, most = Row(), 0
        for start, turn in product(starts, range(len(names))):
            order = {name: axes[name] for name in (*names[turn:], *names[:turn])}
            row = complete_row(dict(start), order, allowed, missing, counts)
            assert row is not None, "a pair is possible where a complete row holds it"
            covered = len(list_pairs(row) & missing)
            if covered > most:
                best, most = row, covered
        rows.append({name: best[name] for name in axes})
        missing -= list_pairs(best)
    return rows
