"""From a tagger's probabilities to the tags of one image, in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sfumato.tools.tag_table import TagTable

THRESHOLD_CATEGORIES = ("general", "character", "copyright", "artist", "meta", "model")


@dataclass(frozen=True, kw_only=True)
class TagRules:
    """thresholds: by category; above 1 it gives no tags. rating, quality: "first", "last", or "" for none.

    undesired, always_first: tags as captions have them.
    """

    thresholds: Mapping[str, float]
    rating: str = ""
    quality: str = ""
    characters_first: bool = False
    undesired: frozenset[str] = frozenset()
    always_first: Sequence[str] = ()


@dataclass
class TagChooser:
    """Chooses by the table, and counts what it chose."""

    table: TagTable
    rules: TagRules
    counts: Counter[str] = field(default_factory=Counter[str])

    def choose(self, probabilities: NDArray[np.float32]) -> list[str]:
        """probabilities: (number of tags,) in [0, 1]."""
        if self.table.is_mapping:
            tags = self._choose_by_probability(probabilities)
            tags = self._add_best(tags, "quality", self.rules.quality, probabilities)
        else:
            tags = self._choose_in_order(probabilities)
        tags = self._add_best(tags, "rating", self.rules.rating, probabilities)
        self.counts.update(tags)
        for tag in self.rules.always_first:
            if tag in tags:
                tags.remove(tag)
                tags.insert(0, tag)
        return tags

    def _choose_in_order(self, probabilities: NDArray[np.float32]) -> list[str]:
        """General tags in the table's order; characters behind them, or each before all that are found so far."""
        tags = self._list_above(self.table.rows("general"), probabilities)
        characters = self._list_above(self.table.rows("character"), probabilities)
        return [*reversed(characters), *tags] if self.rules.characters_first else [*tags, *characters]

    def _choose_by_probability(self, probabilities: NDArray[np.float32]) -> list[str]:
        """The most probable first; characters by themselves where they come first."""
        order = np.argsort(-probabilities, kind="stable").tolist()
        groups = [THRESHOLD_CATEGORIES]
        if self.rules.characters_first:
            groups = [("character",), tuple(name for name in THRESHOLD_CATEGORIES if name != "character")]
        tags: list[str] = []
        for group in groups:
            tags += self._list_above([row for row in order if self.table.categories[row] in group], probabilities)
        return tags

    def _list_above(self, rows: Sequence[int], probabilities: NDArray[np.float32]) -> list[str]:
        thresholds, table = self.rules.thresholds, self.table
        return [
            table.names[row]
            for row in rows
            if probabilities[row] >= thresholds[table.categories[row]] and self._is_wanted(table.names[row])
        ]

    def _add_best(self, tags: list[str], category: str, place: str, probabilities: NDArray[np.float32]) -> list[str]:
        """With the most probable tag of a category, of which every image has one, at the given end."""
        rows = self.table.rows(category) if place else []
        if not rows:
            return tags
        best = self.table.names[max(rows, key=lambda row: probabilities[row])]
        if not self._is_wanted(best):
            return tags
        return [best, *tags] if place == "first" else [*tags, best]

    def _is_wanted(self, tag: str) -> bool:
        return bool(tag) and tag not in self.rules.undesired


def append_tags(present: Sequence[str], tags: Sequence[str]) -> list[str]:
    """The tags that an image has, and behind them those of the new ones that it has not."""
    return [*present, *(tag for tag in tags if tag not in present)]
