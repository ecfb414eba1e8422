"""Perceptual hashes: 64 bits that hardly change when an image is resized, compressed or brightened.

C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, 3.2.1: the signs of the low
frequencies of a small gray copy. The values are those of the package ImageHash (phash).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE, LOW = 32, 8  # pixels of the gray copy; frequencies each way
COLOR_SIDE = 8  # pixels of a colored copy
BITS_OF_OCTETS = np.array([octet.bit_count() for octet in range(256)], np.uint8)
COMPARED_AT_ONCE = 1024  # of the table of distances
Hashes = NDArray[np.uint64]


def make_cosines(size: int) -> NDArray[np.float64]:
    """(size, size) the matrix of the cosine transform (DCT-II), without normalization."""
    k, n = np.arange(size)[:, None], np.arange(size)[None]
    return 2 * np.cos(np.pi * k * (2 * n + 1) / (2 * size))


COSINES = make_cosines(SIDE)[:LOW]


def hash_image(image: Image.Image) -> tuple[int, int]:
    """The hash of an RGB image, and that of its mirror image."""
    gray = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    return hash_gray(gray), hash_gray(gray[:, ::-1])


def hash_gray(gray: NDArray[np.float64]) -> int:
    """gray (SIDE, SIDE). The first bit is the highest."""
    low = COSINES @ gray @ COSINES.T
    bits = (low > np.median(low)).astype(np.uint8)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def shrink_colors(image: Image.Image) -> NDArray[np.uint8]:
    """(COLOR_SIDE, COLOR_SIDE, 3): what tells images apart that differ in color alone."""
    return np.asarray(image.resize((COLOR_SIDE, COLOR_SIDE), Image.Resampling.BOX))


def count_bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """How many bits of each are set."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, values.itemsize)
    return BITS_OF_OCTETS[octets].sum(-1, dtype=np.int64)


def find_close_pairs(hashes: Hashes, others: Hashes, distance: int) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, where hashes[i] and others[j] differ in so many bits at most."""
    for start in range(0, len(hashes), COMPARED_AT_ONCE):
        rows = hashes[start : start + COMPARED_AT_ONCE]
        close = count_bits(rows[:, None] ^ others[None]) <= distance
        for i, j in np.argwhere(close):
            if start + i < j:
                yield int(start + i), int(j)


def group_pairs(count: int, pairs: Iterator[tuple[int, int]] | Sequence[tuple[int, int]]) -> list[list[int]]:
    """Groups of more than one that pairs connect, each in ascending order."""
    parents = list(range(count))

    def find_root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    for i, j in pairs:
        parents[find_root(j)] = find_root(i)
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(find_root(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]
