"""Gray images of more than 8 bits a pixel, as scanners and scientific programs write them, brought to 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from sfumato.errors import UserError


def is_deep_gray(mode: str) -> bool:
    """Whether an image of this mode has one channel of 16 bits, 32 bits or floating point."""
    return mode in ("I", "F") or mode.startswith("I;")


def to_eight_bits(image: Image.Image, path: str) -> Image.Image:
    """Gray in 8 bits; Pillow itself would cut off everything above 255.

    Whole numbers up to 65535 (4095 in a TIFF of 12 bits) and floating-point numbers from 0 to 1 are scaled. UserError
    for other ranges, of which nobody knows what is white. path: for messages.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    white = find_white(image, values)
    if not (low >= 0 and high <= white):  # false of NaN, too
        raise UserError(
            f"{path} has gray values from {low:g} to {high:g}",
            code="gray-range-unknown",
            fix="save it with 8 or 16 bits, or with floating-point values from 0 to 1",
        )
    levels = np.rint(values * (255 / white)) if image.mode == "F" else values.astype(np.int64) * 255 // white
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white
        levels = 255 - levels
    gray = Image.fromarray(levels.astype(np.uint8))
    gray.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return gray


def find_white(image: Image.Image, values: NDArray[Any]) -> int:
    """The value that stands for white; whole numbers in floating point are taken for levels of 8 bits."""
    if image.mode == "F":
        return 255 if values.max() > 1 and (values == np.rint(values)).all() else 1
    is_tiff = isinstance(image, TiffImageFile)
    return 4095 if is_tiff and 12 in np.atleast_1d(image.tag_v2.get(BITSPERSAMPLE, 0)) else 65535
