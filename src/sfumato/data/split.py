"""Which images are held out for validation; none is ever in both halves."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from sfumato.data.pictures import Column
from sfumato.data.plans import DatasetPlan
from sfumato.data.policy import some
from sfumato.data.settings import SubsetSettings
from sfumato.errors import Problems


def halves(count: int, subset: SubsetSettings, seed: int) -> tuple[Column, Column]:
    """Places of the training and of the validation images; of regularisation images none is held out.

    seed: where the subset has none of its own. Depends on nothing else, so a folder that several datasets use is
    split alike in all of them.
    """
    if subset.validation_split == 0 or subset.is_reg:
        return np.arange(count), np.zeros(0, np.int64)
    own = seed if subset.validation_seed is None else subset.validation_seed
    kept, held = held_out(count, subset.validation_split, own)
    return np.array(kept, np.int64), np.array(held, np.int64)


def held_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the training and of the validation images: the last round(count * share) of a shuffle are held out.

    The field's rule for which images are held out, without its overlap of one image in many cases.
    """
    places = list(range(count))
    Random(seed).shuffle(places)
    cut = count - round(count * share)
    return sorted(places[:cut]), places[cut:]


def refuse_overlap(training: Sequence[DatasetPlan], validation: Sequence[DatasetPlan], problems: Problems) -> None:
    """A problem where an image that one subset holds out is trained on through another."""
    held = {path for dataset in validation for subset in dataset.subsets for path in subset.items.pictures.paths()}
    for dataset in training if held else ():
        for subset in dataset.subsets:
            both = [path for path in subset.items.pictures.paths() if path in held]
            if both:
                problems.add(
                    f"{subset.settings.where} trains on {len(both)} images that are held out for validation elsewhere: "
                    f"{some(both)}",
                    fix="give all subsets with these images the same validation_split and validation_seed",
                )
