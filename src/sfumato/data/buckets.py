"""Which size an image is resized and cropped to; all sizes are (width, height) in pixels."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property

Size = tuple[int, int]


def resolutions(area: int, *, shortest: int, longest: int, step: int) -> list[Size]:
    """The bucket sizes of at most `area` pixels, ascending: the square, and for each width the tallest that fits."""
    side = math.isqrt(area) // step * step
    found = {(side, side)}
    for width in range(shortest, longest + 1, step):
        height = min(longest, area // width // step * step)
        if height >= shortest:
            found |= {(width, height), (height, width)}
    return sorted(found)


def covering(image: Size, bucket: Size) -> Size:
    """The size to resize to, so that the image covers the bucket and keeps its shape to half a pixel."""
    (width, height), (bucket_width, bucket_height) = image, bucket
    scale = bucket_height / height if width / height > bucket_width / bucket_height else bucket_width / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def fitted(image: Size, *, area: int, step: int) -> Size:
    """Where images are never enlarged: the size to resize to, at most about `area` pixels, one side a multiple of step.

    An image that is small enough stays as it is. Of the two roundings the one nearer to the image's shape is taken.
    """
    width, height = image
    if width * height <= area:
        return image
    ratio = width / height
    ideal = math.sqrt(area * ratio)
    by_width, by_height = floored(int(ideal + 0.5), step), floored(int(area / ideal + 0.5), step)
    error_of_width = abs(by_width / floored(int(by_width / ratio + 0.5), step) - ratio)
    error_of_height = abs(floored(int(by_height * ratio + 0.5), step) / by_height - ratio)
    if error_of_width < error_of_height:
        return by_width, int(by_width / ratio + 0.5)
    return int(by_height * ratio + 0.5), by_height


def floored(side: int, step: int) -> int:
    """A side of a bucket: a multiple of step, at least one."""
    return max(side // step, 1) * step


def crop_box(image: Size, bucket: Size) -> tuple[float, float, float, float]:
    """left, top, right, bottom as the field conditions models on them: the image fitted INSIDE the bucket, centred.

    The pixels are cropped to cover the bucket instead; models were trained with these numbers all the same.
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
    """Left and top of the centre crop."""
    return (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where one image goes."""

    bucket: Size
    resized: Size  # before the crop


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The bucket rule of one dataset."""

    resolution: Size
    enabled: bool = True  # without buckets every image goes to `resolution`
    shortest: int = 256
    longest: int = 1024
    step: int = 64
    no_upscale: bool = False
    _choices: dict[Size, Choice] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def sizes(self) -> list[Size]:
        """The sizes to choose from; with no_upscale they follow the images instead."""
        if not self.enabled:
            return [self.resolution]
        area = self.resolution[0] * self.resolution[1]
        return resolutions(area, shortest=self.shortest, longest=self.longest, step=self.step)

    @cached_property
    def _exact(self) -> frozenset[Size]:
        return frozenset(self.sizes)

    @cached_property
    def _by_ratio(self) -> tuple[list[float], list[Size]]:
        """Ratios ascending; of several buckets with one ratio the first counts."""
        first: dict[float, Size] = {}
        for width, height in self.sizes:
            first.setdefault(width / height, (width, height))
        ratios = sorted(first)
        return ratios, [first[ratio] for ratio in ratios]

    def nearest(self, image: Size) -> Size:
        """The bucket of exactly this size, else the one whose width/height is nearest by difference."""
        if image in self._exact:
            return image
        ratio = image[0] / image[1]
        ratios, sizes = self._by_ratio
        place = bisect_left(ratios, ratio)
        around = [each for each in (place - 1, place) if 0 <= each < len(ratios)]
        return min((sizes[each] for each in around), key=lambda size: (abs(size[0] / size[1] - ratio), size))

    def choose(self, image: Size) -> Choice:
        """Bucket and resized size for an image of this size."""
        if image not in self._choices:
            follow = self.enabled and self.no_upscale
            self._choices[image] = self._following(image) if follow else self._covered(image, self.nearest(image))
        return self._choices[image]

    def _covered(self, image: Size, bucket: Size) -> Choice:
        return Choice(bucket=bucket, resized=covering(image, bucket))

    def _following(self, image: Size) -> Choice:
        """A bucket as large as the image, rounded down; a side below one step is enlarged to it, within the area."""
        area = self.resolution[0] * self.resolution[1]
        resized = fitted(image, area=area, step=self.step)
        if min(resized) >= self.step:
            return Choice(bucket=(floored(resized[0], self.step), floored(resized[1], self.step)), resized=resized)
        sides = [floored(min(side, area // self.step), self.step) for side in resized]
        return self._covered(image, (sides[0], sides[1]))
