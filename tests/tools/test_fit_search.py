"""The search finds the fastest levels that fit, as trying all of them does, in far fewer trials."""

from __future__ import annotations

import random
from itertools import product

import pytest

from sfumato.tools.fit_search import Levels, find_fastest


def find_by_trying_all(highest, times, fits):
    def rank(levels: Levels) -> tuple[float, int, Levels]:
        time = sum(level * each for level, each in zip(levels, times, strict=True))
        return round(time, 6), sum(map(bool, levels)), levels

    every = product(*(range(last + 1) for last in highest))
    return min((levels for levels in every if fits(levels)), key=rank, default=None)


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum(seed):
    """Of peaks that fall with every level; a set that cannot be tried is passed over. No set is tried twice."""
    rng = random.Random(seed)
    highest = [rng.choice([1, 1, 2, 5]) for _ in range(5)]
    times = [rng.choice([0.0, 0.05, 0.1, 0.3]) for _ in range(5)]
    saved = [rng.uniform(0, 10) for _ in range(5)]
    refused = tuple(highest) if seed % 4 == 0 else None
    limit = rng.uniform(-1, 25) - sum(last * each for last, each in zip(highest, saved, strict=True))
    trials: list[Levels] = []

    def fits(levels: Levels) -> bool | None:
        trials.append(levels)
        needs = -sum(level * each for level, each in zip(levels, saved, strict=True))
        return None if levels == refused else needs <= limit

    found = find_fastest(highest, times, fits)
    assert len(trials) == len(set(trials))
    assert found == find_by_trying_all(highest, times, fits)


def test_what_saves_time_is_always_taken():
    assert find_fastest([1, 1], [-0.1, 0.3], lambda levels: True) == (1, 0)
    assert find_fastest([1, 1], [-0.1, 0.3], lambda levels: levels[1] == 1) == (1, 1)


def test_few_trials():
    """Six measures in seven levels of the last, of which one combination is just enough."""
    trials: list[Levels] = []

    def fits(levels: Levels) -> bool:
        trials.append(levels)
        return levels[2] >= 1 and levels[5] >= 3

    assert find_fastest([1, 1, 1, 1, 1, 6], [-0.1, -0.1, 0.0, 0.05, 0.3, 0.05], fits) == (1, 1, 1, 0, 0, 3)
    assert len(trials) <= 12


def test_nothing_fits_after_one_trial():
    trials: list[Levels] = []
    assert find_fastest([1, 4], [0.0, 0.1], lambda levels: trials.append(levels) is not None) is None
    assert trials == [(1, 4)]
