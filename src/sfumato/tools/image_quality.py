"""What is wrong with an image as a picture to learn from: tiny, blurry, clipped, or compressed too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.data.images import open_image

Gray = NDArray[np.float64]
MEASURED_SIDE = 1024  # pixels: larger images are measured as they are trained, smaller
BLUR_WINDOW = 11  # pixels
BLOCK_SIDE = 8  # pixels a side of JPEG's blocks
DARK, BRIGHT = 1, 254  # of 255: black and white
LUMINANCE = (  # JPEG (ITU T.81), table K.1, row by row
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QualityLimits:
    """Beyond which an image is named."""

    min_side: int = 256  # pixels of the shorter side
    max_blur: float = 0.6  # of 1
    max_clipped: float = 0.35  # share of the pixels
    min_quality: int = 50  # of JPEG, 1 to 100
    max_blockiness: float = 1.5


@dataclass(frozen=True, kw_only=True)
class QualityMeasures:
    """blur: 0 to 1. clipped: share of black and white pixels. quality: of a JPEG, else None. blockiness: 1 without."""

    size: tuple[int, int]
    blur: float
    clipped: float
    quality: int | None
    blockiness: float

    def list_faults(self, limits: QualityLimits) -> Iterator[tuple[str, str]]:
        """(kind, what was measured)"""
        width, height = self.size
        if min(width, height) < limits.min_side:
            yield "tiny", f"{width}×{height}"
        if self.blur > limits.max_blur:
            yield "blurry", f"blur {self.blur:.2f}"
        if self.clipped > limits.max_clipped:
            yield "clipped", f"{100 * self.clipped:.0f}% black or white"
        if self.quality is not None and self.quality < limits.min_quality:
            yield "over-compressed", f"JPEG quality {self.quality}"
        elif self.blockiness > limits.max_blockiness:
            yield "over-compressed", f"blocks {self.blockiness:.1f}× as strong as the rest"


def measure_quality(image: Image.Image, data: bytes) -> QualityMeasures:
    """image: decoded from data, RGB."""
    gray = to_gray(image)
    small = image.copy()
    small.thumbnail((MEASURED_SIDE, MEASURED_SIDE), Image.Resampling.BOX)
    return QualityMeasures(
        size=image.size,
        blur=measure_blur(to_gray(small)),
        clipped=measure_clipped(np.asarray(small)),
        quality=estimate_quality(data),
        blockiness=measure_blockiness(gray),
    )


def to_gray(image: Image.Image) -> Gray:
    """(H, W) in [0, 1]"""
    return np.asarray(image.convert("L"), np.float64) / 255


def measure_blur(gray: Gray) -> float:
    """0 for a sharp image, 1 for one that further blur hardly changes. 0 where it is too small or has no edge at all.

    F. Crété-Roffet et al., The Blur Effect, SPIE 2007: how much of the differences between neighbors a strong blur
    takes away; the worse of both directions.
    """
    if min(gray.shape) <= BLUR_WINDOW:
        return 0.0
    blurs = []
    for axis in (0, 1):
        before, after = (np.abs(filter_sobel(pixels, axis)) for pixels in (gray, blur_along(gray, axis)))
        lost = np.maximum(0, before - after)[2:-1, 2:-1].sum()
        total = before[2:-1, 2:-1].sum()
        blurs.append((total - lost) / total if total > 1e-6 * before.size else 0.0)
    return float(max(blurs))


def blur_along(gray: Gray, axis: int) -> Gray:
    """The mean over a window; the image is mirrored at its ends."""
    half = BLUR_WINDOW // 2
    padding = [(half, half) if i == axis else (0, 0) for i in range(2)]
    sums = np.cumsum(np.pad(gray, padding, mode="symmetric"), axis)
    first = np.zeros_like(np.take(sums, [0], axis))
    sums = np.concatenate([first, sums], axis)
    count = gray.shape[axis]
    ends, starts = np.arange(count) + BLUR_WINDOW, np.arange(count)
    return (np.take(sums, ends, axis) - np.take(sums, starts, axis)) / BLUR_WINDOW


def filter_sobel(gray: Gray, axis: int) -> Gray:
    """Half the difference of both neighbors along `axis`, smoothed across it by 1, 2, 1."""
    padded = np.pad(gray, 1, mode="symmetric")
    across = 1 - axis
    count = gray.shape[across]
    smooth = sum(weight * np.take(padded, np.arange(count) + i, across) for i, weight in enumerate((0.25, 0.5, 0.25)))
    places = np.arange(gray.shape[axis])
    return (np.take(smooth, places + 2, axis) - np.take(smooth, places, axis)) / 2


def measure_clipped(pixels: NDArray[np.uint8]) -> float:
    """The share of pixels (H, W, 3) that are black or white in all channels.

    What three of the four corners are is a background, as drawings have it, and does not count.
    """
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    share = 0.0
    for clipped, clipped_corners in (
        ((pixels <= DARK).all(2), (corners <= DARK).all(1)),
        ((pixels >= BRIGHT).all(2), (corners >= BRIGHT).all(1)),
    ):
        if clipped_corners.sum() < 3:
            share += float(clipped.mean())
    return share


def estimate_quality(data: bytes) -> int | None:
    """The quality with which a JPEG was saved, 1 to 100 as libjpeg counts it; None for any other file."""
    with open_image(BytesIO(data)) as image:
        tables = image.quantization if image.format == "JPEG" else None  # pyright: ignore[reportAttributeAccessIssue]
    if not tables:
        return None
    found = sum(tables[min(tables)])
    return min(range(1, 101), key=lambda quality: abs(sum(scale_luminance(quality)) - found))


def scale_luminance(quality: int) -> list[int]:
    """The table that libjpeg writes for a quality."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return [min(255, max(1, (value * percent + 50) // 100)) for value in LUMINANCE]


def measure_blockiness(gray: Gray) -> float:
    """How much stronger differences are at the borders of JPEG's blocks than elsewhere; 1 where there are no blocks."""
    if min(gray.shape) < 4 * BLOCK_SIDE:
        return 1.0
    ratios = []
    for axis in (0, 1):
        steps = np.abs(np.diff(gray, axis=axis)).mean(1 - axis)
        at_border = np.arange(1, len(steps) + 1) % BLOCK_SIDE == 0
        inside = float(steps[~at_border].mean())
        ratios.append(float(steps[at_border].mean()) / inside if inside > 1e-3 else 1.0)
    return min(ratios)
