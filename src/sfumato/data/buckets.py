"""Buckets: the size that an image is resized and cropped to; all sizes are (width, height) in pixels."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property

Size = tuple[int, int]


def list_bucket_sizes(area: int, *, shortest: int, longest: int, step: int) -> list[Size]:
    """The bucket sizes of at most `area` pixels, ascending: the square, and for each width the tallest that fits."""
    side = math.isqrt(area) // step * step
    sizes = {(side, side)}
    for width in range(shortest, min(longest, area // shortest) + 1, step):  # wider ones are lower than `shortest`
        height = min(longest, area // width // step * step)
        if height >= shortest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def resize_to_cover(image: Size, bucket: Size) -> Size:
    """The size at which the image covers the bucket and keeps its aspect ratio to half a pixel."""
    (width, height), (bucket_width, bucket_height) = image, bucket
    scale = bucket_height / height if width / height > bucket_width / bucket_height else bucket_width / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def resize_to_area(image: Size, *, area: int, step: int) -> Size:
    """The size to resize to with bucket_no_upscale: at most about `area` pixels, one side a multiple of step.

    A smaller image keeps its size. Of the two possible roundings, the one closer to the image's aspect ratio is used.
    """
    width, height = image
    if width * height <= area:
        return image
    ratio = width / height
    ideal = math.sqrt(area * ratio)
    by_width, by_height = round_down(int(ideal + 0.5), step), round_down(int(area / ideal + 0.5), step)
    error_of_width = abs(by_width / round_down(int(by_width / ratio + 0.5), step) - ratio)
    error_of_height = abs(round_down(int(by_height * ratio + 0.5), step) / by_height - ratio)
    if error_of_width < error_of_height:
        return by_width, int(by_width / ratio + 0.5)
    return int(by_height * ratio + 0.5), by_height


def round_down(side: int, step: int) -> int:
    """A side of a bucket: the side rounded down to a multiple of step, at least one step."""
    return max(side // step, 1) * step


def crop_box(image: Size, bucket: Size) -> tuple[float, float, float, float]:
    """The image centered INSIDE the bucket, (left, top, right, bottom): the size conditioning of sd-scripts.

    The real crop covers the bucket instead, but models were trained with these numbers.
    """
    ratio = image[0] / image[1]
    width, height = float(bucket[0]), float(bucket[1])
    if width / height > ratio:
        width = height * ratio
    else:
        height = width / ratio
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def crop_offset(resized: Size, bucket: Size) -> Size:
    """(left, top) of the center crop."""
    return (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2


@dataclass(frozen=True, kw_only=True)
class BucketChoice:
    """The bucket of one image, and the size to resize it to."""

    bucket: Size
    resized: Size  # before the crop


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The bucket rule of one dataset."""

    resolution: Size
    enabled: bool = True  # if False, every image goes to `resolution`
    shortest: int = 256
    longest: int = 1024
    step: int = 64
    no_upscale: bool = False
    _choices: dict[Size, BucketChoice] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def sizes(self) -> list[Size]:
        """The sizes to choose from; not used with no_upscale, where the sizes follow the images."""
        if not self.enabled:
            return [self.resolution]
        area = self.resolution[0] * self.resolution[1]
        return list_bucket_sizes(area, shortest=self.shortest, longest=self.longest, step=self.step)

    @cached_property
    def _exact(self) -> frozenset[Size]:
        return frozenset(self.sizes)

    @cached_property
    def _by_ratio(self) -> tuple[list[float], list[Size]]:
        """Aspect ratios ascending, and their buckets; of several buckets with one ratio the first is used."""
        first: dict[float, Size] = {}
        for width, height in self.sizes:
            first.setdefault(width / height, (width, height))
        ratios = sorted(first)
        return ratios, [first[ratio] for ratio in ratios]

    def find_nearest(self, image: Size) -> Size:
        """The bucket of exactly this size, otherwise the one whose width/height differs least."""
        if image in self._exact:
            return image
        ratio = image[0] / image[1]
        ratios, sizes = self._by_ratio
        index = bisect_left(ratios, ratio)
        candidates = sizes[max(index - 1, 0) : index + 1]
        return min(candidates, key=lambda size: (abs(size[0] / size[1] - ratio), size))

    def choose(self, image: Size) -> BucketChoice:
        """Bucket and resized size for an image of this size."""
        if image not in self._choices:
            follow = self.enabled and self.no_upscale
            self._choices[image] = self._follow_image(image) if follow else self._cover(image, self.find_nearest(image))
        return self._choices[image]

    def _cover(self, image: Size, bucket: Size) -> BucketChoice:
        return BucketChoice(bucket=bucket, resized=resize_to_cover(image, bucket))

    def _follow_image(self, image: Size) -> BucketChoice:
        """The image's size rounded down to steps; a side shorter than one step is enlarged to it, within the area."""
        area = self.resolution[0] * self.resolution[1]
        resized = resize_to_area(image, area=area, step=self.step)
        if min(resized) >= self.step:
            bucket = round_down(resized[0], self.step), round_down(resized[1], self.step)
            return BucketChoice(bucket=bucket, resized=resized)
        sides = [round_down(min(side, area // self.step), self.step) for side in resized]
        return self._cover(image, (sides[0], sides[1]))
