"""Edges of images as control images have them, by Canny's method with OpenCV's integers, pixel by pixel the same.

J. Canny, A Computational Approach to Edge Detection, 1986: the strongest differences across an edge are kept, and of
the weaker ones those that hang together with a strong one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Differences = NDArray[np.int64]
SHIFT = 15  # bits behind the point
TANGENT = int(0.4142135623730950488 * (1 << SHIFT) + 0.5)  # of 22.5 degrees


def find_edges(pixels: NDArray[np.uint8], low: float, high: float) -> NDArray[np.bool_]:
    """(H, W), of pixels (H, W, 3): edges stronger than `high`, and those stronger than `low` that touch them."""
    low, high = sorted((int(low), int(high)))
    across, down = find_strongest_differences(pixels.astype(np.int64))
    strength = np.abs(across) + np.abs(down)
    edges = (strength > low) & is_ridge(across, down, strength)
    return grow(edges & (strength > high), edges)


def find_strongest_differences(pixels: Differences) -> tuple[Differences, Differences]:
    """(H, W) each: the Sobel differences to the right and downwards of the channel that has the largest."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth_down = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    smooth_across = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across, down = smooth_down[:, 2:] - smooth_down[:, :-2], smooth_across[2:] - smooth_across[:-2]
    channel = (np.abs(across) + np.abs(down)).argmax(2)[..., None]
    return np.take_along_axis(across, channel, 2)[..., 0], np.take_along_axis(down, channel, 2)[..., 0]


def is_ridge(across: Differences, down: Differences, strength: Differences) -> NDArray[np.bool_]:
    """Where no neighbor across the edge, in one of four directions, is stronger; beyond the image there is nothing."""
    padded = np.pad(strength, 1)
    height, width = strength.shape

    def neighbor(y: int, x: int) -> Differences:
        return padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    flat = np.abs(across) * TANGENT
    steep = flat + (np.abs(across) << (SHIFT + 1))
    rise = np.abs(down) << SHIFT
    horizontal = (strength > neighbor(0, -1)) & (strength >= neighbor(0, 1))
    vertical = (strength > neighbor(-1, 0)) & (strength >= neighbor(1, 0))
    falling = (strength > neighbor(-1, -1)) & (strength > neighbor(1, 1))
    rising = (strength > neighbor(-1, 1)) & (strength > neighbor(1, -1))
    diagonal = np.where((across ^ down) < 0, rising, falling)
    return np.where(rise < flat, horizontal, np.where(rise > steep, vertical, diagonal))


def grow(seeds: NDArray[np.bool_], allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The allowed pixels that hang together with a seed, over corners, too."""
    height, width = seeds.shape
    found = np.zeros((height + 2, width + 2), bool)
    open_pixels = np.pad(allowed, 1)
    waiting = np.argwhere(np.pad(seeds & allowed, 1))
    while len(waiting):
        found[waiting[:, 0], waiting[:, 1]] = True
        next_to = np.zeros_like(found)
        for y in (-1, 0, 1):
            for x in (-1, 0, 1):
                next_to[waiting[:, 0] + y, waiting[:, 1] + x] = True
        waiting = np.argwhere(next_to & open_pixels & ~found)
    return found[1:-1, 1:-1]
