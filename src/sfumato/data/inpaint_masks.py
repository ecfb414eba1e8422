"""Masks for training inpainting models: what is painted is drawn at random, as clouds, polygons, boxes and ellipses."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sfumato.data.buckets import Size

Points = list[tuple[float, float]]
CLOUD_SHARE, POLYGON_SHARE = 0.4, 0.35  # of all masks; the rest are boxes and ellipses, all as in sd-scripts
OCTAVES = 4  # of a cloud's noise, each half as large as the one before
CORNERS, IRREGULARITY = 6, 0.4  # of a polygon


def draw_mask(rng: Random, size: Size) -> NDArray[np.float32]:
    """(height, width): 1 where the model is to paint. size: width and height in pixels."""
    kind = rng.random()
    if kind < CLOUD_SHARE:
        mask = draw_cloud(rng, size)
        if rng.random() < 1 / 3:
            mask = np.maximum(mask, draw_shape(rng, size, polygon=rng.random() < 0.5))
        return mask
    if kind >= CLOUD_SHARE + POLYGON_SHARE:
        return draw_shape(rng, size, polygon=False)
    mask = draw_shape(rng, size, polygon=True)
    return np.maximum(mask, draw_shape(rng, size, polygon=True)) if rng.random() < 0.5 else mask


def draw_cloud(rng: Random, size: Size) -> NDArray[np.float32]:
    """Where fractal noise in [-1, 1] is above a threshold of about 0.2."""
    noise = np.zeros(size[::-1], np.float32)
    for octave in range(OCTAVES):
        cells = 4 * 2**octave
        values = np.array([rng.uniform(-1, 1) for _ in range(cells * cells)], np.float32).reshape(cells, cells)
        noise += np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)) / 2**octave
    noise /= max(float(np.abs(noise).max()), 1e-6)
    return (noise > rng.gauss(0.2, 0.1)).astype(np.float32)


def draw_shape(rng: Random, size: Size, *, polygon: bool) -> NDArray[np.float32]:
    """A polygon, else a box or an ellipse, that covers about 10 to 60 % of the image."""
    image = Image.new("L", size)
    draw = ImageDraw.Draw(image)
    share = rng.uniform(0.1, 0.6) ** 0.5  # of each side
    width, height = size[0] * share * rng.uniform(0.8, 1.2), size[1] * share * rng.uniform(0.8, 1.2)
    x, y = rng.uniform(0.2, 0.8) * size[0], rng.uniform(0.2, 0.8) * size[1]
    if polygon:
        draw.polygon(make_corners(rng, x, y, width / 2, height / 2), fill=255)
    else:
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        (draw.rectangle if rng.random() < 0.5 else draw.ellipse)(box, fill=255)
    return np.asarray(image, np.float32) / np.float32(255)


def make_corners(rng: Random, x: float, y: float, width: float, height: float) -> Points:
    """Corners around a point, at irregular angles and distances. width, height: half of the polygon's."""
    corners: Points = []
    for number in range(CORNERS):
        angle = 2 * np.pi * (number + rng.uniform(-IRREGULARITY, IRREGULARITY) / 2) / CORNERS
        reach = 1 + rng.uniform(-IRREGULARITY, IRREGULARITY)
        corners.append((x + width * reach * float(np.cos(angle)), y + height * reach * float(np.sin(angle))))
    return corners
