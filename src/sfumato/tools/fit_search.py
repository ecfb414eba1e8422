"""The search for the fastest set of memory measures that fits, in few trials, since each takes many seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

Levels = tuple[int, ...]  # of every measure, 0: not taken


def find_fastest(
    highest: Sequence[int], times: Sequence[float], fits: Callable[[Levels], bool | None]
) -> Levels | None:
    """The levels with the least time that fit; of equal times those of the fewest measures. None where nothing fits.

    highest: the last level of each measure. times: what each level of it adds; measures that save time are always
    taken, those that cost none in every trial until it is known which others are needed. fits: one trial; None where
    these levels cannot be tried. A higher level is taken to need no more memory, so what fits at no higher level is not
    tried lower down; the levels that are found have been tried in any case.
    """

    def rank(levels: Levels) -> tuple[float, int, Levels]:
        time = sum(level * time for level, time in zip(levels, times, strict=True))
        return round(time, 6), sum(level > 0 for level in levels), levels

    choices = [
        range(last if time < 0 else 0, last + 1) for last, time in zip(highest, times, strict=True)
    ]  # a measure that saves time has one choice
    open_sets = sorted(product(*choices), key=rank)
    best: Levels | None = None
    trial = tuple(highest)
    while open_sets:
        result = fits(trial)
        if result:
            best = trial
            open_sets = open_sets[: open_sets.index(trial)]
        elif result is None:
            open_sets.remove(trial)
        else:
            open_sets = [levels for levels in open_sets if not is_within(levels, trial)]
        if open_sets:
            chosen = open_sets[len(open_sets) // 4]  # most slow ones fit, and a bound refuses most fast ones at once
            complete = tuple(
                last if time == 0 else level for level, last, time in zip(chosen, highest, times, strict=True)
            )
            trial = complete if complete in open_sets else chosen
    return best


def is_within(levels: Levels, others: Levels) -> bool:
    """Whether no measure is at a higher level than there."""
    return all(level <= other for level, other in zip(levels, others, strict=True))
