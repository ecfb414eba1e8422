"""From the bytes of an image file to the pixels of its bucket: decode, turn, resize, crop, flip."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.data.buckets import Size, crop_offset
from sfumato.data.headers import DECODER_ERRORS, header_of
from sfumato.errors import UserError

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "box": Image.Resampling.BOX,
}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
VERSION = 1  # of what `prepare` does; raised when its pixels change, so that caches are made anew


def read(path: str) -> bytes:
    """The bytes of a file; UserError, which names it, where they cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def content_hash(data: bytes) -> bytes:
    """What an image is known by in caches, wherever it lies and whatever it is called."""
    return hashlib.blake2b(data, digest_size=20).digest()


def prepare(data: bytes, transform: Transform, *, size: Size, path: str) -> Pixels:
    """The pixels of a bucket. size: the image's, for which the transform was chosen; the path is for messages.

    UserError, which names the file, where it is damaged or has another size by now.
    """
    image = decode(data, path)
    if image.size != size:
        was, now = (f"{width}x{height}" for width, height in (size, image.size))
        raise UserError(f"{path} is {now} pixels, but was {was} when the run began", fix="start again")
    if image.size != transform.resized:
        image = image.resize(transform.resized, FILTERS[transform.interpolation])
    left, top = crop_offset(transform.resized, transform.bucket)
    width, height = transform.bucket
    pixels = np.asarray(image)[top : top + height, left : left + width]
    return np.ascontiguousarray(pixels[:, ::-1] if transform.flip else pixels)


def decode(data: bytes, path: str) -> Image.Image:
    """8-bit RGB, turned upright; alpha is dropped, not blended; greys, palettes and CMYK are converted."""
    orientation = header_of(data, path).orientation
    try:
        with Image.open(BytesIO(data)) as image:
            upright = eight_bit_rgb(image)
    except DECODER_ERRORS as error:
        raise UserError(f"{path} is damaged ({error})", fix="replace or remove it") from error
    return upright.transpose(TURNS[orientation]) if orientation != 1 else upright


def eight_bit_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(grey, 0, 65535) * 255 // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def interpolation_for(image: Size, resized: Size, wanted: str | None) -> str:
    """The wanted filter, else area where no side grows and lanczos where one does."""
    if wanted:
        return wanted
    return "area" if resized[0] <= image[0] and resized[1] <= image[1] else "lanczos"


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What is done to the pixels; part of a cache entry's name."""

    resized: Size
    bucket: Size
    interpolation: str
    flip: bool = False

    @property
    def name(self) -> str:
        """The same for transforms that give the same pixels."""
        resized, bucket = (f"{width}x{height}" for width, height in (self.resized, self.bucket))
        filtered = FILTERS[self.interpolation].name.lower()
        return f"v{VERSION}/{resized}/{bucket}/{filtered}/{'flipped' if self.flip else 'plain'}"
