"""What a ControlNet reads of an image file: the image itself, or its edges (Canny 1986)."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from sfumato.data.edges import find_edges
from sfumato.errors import UserError

NO_PREPARATION = "none"
CANNY = re.compile(r"canny(?:_(\d+)_(\d+))?")
CANNY_LIMITS = (
    63,
    191,
)  # of the size of a gradient in 8-bit steps: edges begin above the second, go on above the first
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


def prepare_control_image(image: Image.Image, preparation: str) -> Image.Image:
    """The image, or with "canny" or "canny_LOW_HIGH" its edges, white on black. UserError for another word."""
    if preparation in (NO_PREPARATION, ""):
        return image
    match = CANNY.fullmatch(preparation)
    if match is None:
        raise UserError(
            f"--control_net_preps: {preparation!r} is not known",
            code="control-preparation-unknown",
            fix="canny_63_191 for edges, or none for the image itself",
        )
    low, high = (int(text) for text in match.groups()) if match[1] else CANNY_LIMITS
    gray = np.floor(np.asarray(image.convert("RGB")).astype(np.float64) @ np.array(_LUMA) + 0.5).astype(np.uint8)
    edges = find_edges(np.repeat(gray[..., None], 3, axis=2), low, high)
    return Image.fromarray(np.repeat(edges[..., None].astype(np.uint8) * 255, 3, axis=2))
