"""Embedded ICC profiles: images that are not in sRGB are converted to it when they are decoded.

A profile that leaves every color where it is within 2 of 255 levels is sRGB: its images stay bit for bit as they are.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageCms

SRGB_LEVELS = 2  # by which variants of the sRGB profile differ
PROBE_LEVELS = 9  # of each channel, in the colors that a profile is tried on
PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)
GRAY_MODES = frozenset({"1", "L", "LA", "I", "F"})
COLOR_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}  # Pillow's mode -> the name in profiles

ProfileKind = Literal["none", "srgb", "other", "broken"]


class Conversion(NamedTuple):
    """From the colors of a profile to sRGB."""

    mode: str  # of the image that it takes: RGB, L or CMYK
    transform: ImageCms.ImageCmsTransform


def classify_profile(image: Image.Image) -> ProfileKind:
    """What the profile of an open image is; "broken" also where it belongs to images of another kind."""
    profile = image.info.get("icc_profile")
    if not profile:
        return "broken" if "icc_profile" in image.info else "none"
    try:
        return "other" if find_conversion(profile, image.mode) else "srgb"
    except PROFILE_ERRORS:
        return "broken"


def convert_to_srgb(image: Image.Image) -> Image.Image | None:
    """The image in 8-bit RGB and sRGB, by the profile embedded in it; None where nothing is to be converted.

    Transparency is dropped. The image must have 8 bits a channel.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    try:
        conversion = find_conversion(profile, image.mode)
    except PROFILE_ERRORS:  # reported when the image was found
        return None
    if conversion is None:
        return None
    if image.mode != conversion.mode:
        image = (image.convert("RGBA") if image.has_transparency_data else image).convert(conversion.mode)
    return conversion.transform.apply(image)


@lru_cache(maxsize=64)
def find_conversion(profile: bytes, mode: str) -> Conversion | None:
    """From the colors of a profile, in an image of this mode, to sRGB; None if that changes none.

    A gray image may have a profile of RGB. One of PROFILE_ERRORS where the profile is broken or of another color space.
    """
    opened = ImageCms.ImageCmsProfile(BytesIO(profile))
    core: Any = opened.profile
    space = core.xcolor_space
    gray = mode in GRAY_MODES or mode.startswith("I;")
    wanted = "CMYK" if mode == "CMYK" else "L" if gray and space == COLOR_SPACES["L"] else "RGB"
    if space != COLOR_SPACES[wanted]:
        raise ValueError(f"a profile of {space.strip()} in an image of mode {mode}")
    # Interpolating between few levels of gray, as is done by default, makes errors of 10 levels in the shadows.
    flags = ImageCms.Flags.NOOPTIMIZE if wanted == "L" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), wanted, "RGB", flags=flags)
    if wanted != "CMYK":
        probe = make_probe(wanted)
        before = np.asarray(probe.convert("RGB")).astype(np.int64)
        if np.abs(np.asarray(transform.apply(probe)) - before).max() <= SRGB_LEVELS:
            return None
    return Conversion(wanted, transform)


def make_probe(mode: str) -> Image.Image:
    """Colors at equal distances: all levels of gray, or a grid of red, green and blue."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, PROBE_LEVELS).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1)
    return Image.fromarray(grid.reshape(1, -1, 3))
