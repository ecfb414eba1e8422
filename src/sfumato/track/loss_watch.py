"""Which images a run finds hard or easy: each loss is compared with the mean of its noise level.

Raw losses say little of an image, since they depend on the timestep far more than on anything else. Loss divided by
the mean of its noise level does not: an image whose caption is wrong, or which is damaged, stays above 1, and one that
is memorised falls below the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL_SAMPLES = 40  # of a noise level at least, so that its mean says something
MAX_LEVELS = 20
MIN_SAMPLES, MIN_IMAGES = 5, 8  # of an image, and of a run, for a ranking that is more than chance


class ImageLoss(NamedTuple):
    """An image by its number in the run's list."""

    number: int
    ratio: float  # mean of its losses, each divided by the mean of its noise level; 1 for an image like all others
    samples: int


def rank_images(t: ArrayLike, losses: ArrayLike, numbers: ArrayLike) -> Sequence[ImageLoss]:
    """The highest ratio first; t, loss and image number of every sample, -1 for samples of no listed image.

    Empty while there are too few images that were seen often enough.
    """
    times, values, images = np.asarray(t, float), np.asarray(losses, float), np.asarray(numbers, np.int64)
    known = images >= 0
    times, values, images = times[known], values[known], images[known]
    if not len(images):
        return ()
    ratios = values / level_means(times, values)
    found, rows, counts = np.unique(images, return_inverse=True, return_counts=True)
    means = np.bincount(rows, ratios) / counts
    ranked = [
        ImageLoss(int(number), float(mean), int(count))
        for number, mean, count in zip(found, means, counts, strict=True)
        if count >= MIN_SAMPLES
    ]
    return sorted(ranked, key=lambda image: -image.ratio) if len(ranked) >= MIN_IMAGES else ()


def level_means(t: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """(N,) for each sample the mean loss of its noise level. Levels have equally many samples, whatever t was drawn."""
    levels = min(MAX_LEVELS, max(1, len(t) // LEVEL_SAMPLES))
    level = np.empty(len(t), np.int64)
    level[np.argsort(t, kind="stable")] = np.arange(len(t)) * levels // len(t)
    means = np.bincount(level, losses, minlength=levels) / np.bincount(level, minlength=levels)
    return np.maximum(means, np.finfo(float).tiny)[level]
