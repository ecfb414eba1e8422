"""Images that can no longer be read while a run trains, with --on_bad_image skip: another one takes their place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import TypeVar

from sfumato.data.batch_sampler import Sample
from sfumato.data.buckets import Size
from sfumato.errors import UserError

log = logging.getLogger(__name__)
_T = TypeVar("_T")
TRIED_IMAGES = 16  # after which the images are taken to be lost together, e.g. with their disk


class SubstituteFinder:
    """Finds other images, and reports each lost one once."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def load_other(self, sample: Sample, bucket: Size, load: Callable[[Sample], _T], error: UserError) -> _T | None:
        """What `load` gives for another image of the subset and the bucket, at the sample's id.

        None where the bucket has none and the subset has others that can be read: the sample is then to be empty.
        Raises the error where none of the others that are tried can be read.
        """
        self._report(sample.item.image.path, error)
        for other in islice(iterate_others(sample, bucket), TRIED_IMAGES):
            with suppress(UserError):
                return load(other)
        for other in islice(iterate_others(sample, None), TRIED_IMAGES):
            with suppress(UserError):
                other.item.image.read()
                return None
        raise error

    def _report(self, path: str, error: UserError) -> None:
        if path not in self._reported:
            self._reported.add(path)
            log.warning("%s; another image takes its place", error.what)


def iterate_others(sample: Sample, bucket: Size | None) -> Iterator[Sample]:
    """The sample with each other image of its subset and of the bucket, those that follow first; None: any bucket."""
    subset, path = sample.subset, sample.item.image.path
    used = [row for row, repeats in enumerate(subset.repeats) if repeats]
    if bucket is not None:
        in_bucket = set(subset.items.group_by_bucket().get(bucket, []))
        used = [row for row in used if row in in_bucket]
    items = [subset.items.get_row(row) for row in used]
    own = next((place for place, item in enumerate(items) if item.image.path == path), 0)
    for item in (*items[own + 1 :], *items[:own]):
        yield sample._replace(item=item, image_number=-1)
