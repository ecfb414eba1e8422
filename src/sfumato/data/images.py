"""From the bytes of an image file to the pixels of its bucket: decode, turn, resize, crop, mirror, colour."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.data.buckets import Size, crop_offset
from sfumato.data.find.headers import DECODER_ERRORS, header_of
from sfumato.errors import UserError

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB
Plane = NDArray[np.uint8]  # (height, width): a mask, 255 where everything counts

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
SURPLUS = 8  # times the area of its bucket that a picture may have before only a part of it is resized
MARGIN = 4  # pixels, of the picture or of the result, whichever are larger: further than any filter looks
VERSION = 1  # of what `prepare` does; raised when its pixels change, so that caches are made anew


def content_hash(data: bytes) -> bytes:
    """What an image is known by in caches, wherever it lies and whatever it is called."""
    return hashlib.blake2b(data, digest_size=20).digest()


def prepare(data: bytes, transform: Transform, *, size: Size, path: str) -> Pixels:
    """The pixels of a bucket. size: the image's, for which the transform was chosen; the path is for messages.

    UserError, which names the file, where it is damaged or has another size by now.
    """
    image, _ = layers(data, path, alpha=False)
    return coloured(placed(same(image, size, path), transform), transform.colour)


def prepare_with_alpha(data: bytes, transform: Transform, *, size: Size, path: str) -> tuple[Pixels, Plane]:
    """The same, and the alpha channel placed like the pixels: 255 everywhere where the image has none."""
    image, alpha = layers(data, path, alpha=True)
    pixels = coloured(placed(same(image, size, path), transform), transform.colour)
    return pixels, np.full(pixels.shape[:2], 255, np.uint8) if alpha is None else placed(alpha, transform)


def prepare_red(data: bytes, transform: Transform, *, size: Size, path: str) -> Plane:
    """The red channel of a mask image, placed like the pixels; greys count as red."""
    return placed(same(decode(data, path), size, path).getchannel("R"), transform)


def same(image: Image.Image, size: Size, path: str) -> Image.Image:
    if image.size != size:
        was, now = (f"{width}x{height}" for width, height in (size, image.size))
        raise UserError(f"{path} is {now} pixels, but was {was} when the run began", fix="start again")
    return image


def placed(image: Image.Image, transform: Transform) -> NDArray[np.uint8]:
    """Resized, cropped, mirrored; an image of another size but the same shape lands on the same pixels."""
    left, top = transform.corner
    width, height = transform.bucket
    if transform.resized[0] * transform.resized[1] > SURPLUS * width * height:
        image, (left, top) = window(image, transform)
    elif image.size != transform.resized:
        image = image.resize(transform.resized, FILTERS[transform.interpolation])
    pixels = np.asarray(image)[top : top + height, left : left + width]
    return np.ascontiguousarray(pixels[:, ::-1] if transform.flip else pixels)


def window(image: Image.Image, transform: Transform) -> tuple[Image.Image, Size]:
    """Only what the crop shows, resized as all of it would be, and the crop's corner in there.

    A picture of 30000x10 pixels that is to cover 1024x1024 would take ten gigabytes otherwise.
    """
    (left, right), (top, bottom) = map(stretch, transform.corner, transform.bucket, transform.resized, image.size)
    across, down = (old / new for old, new in zip(image.size, transform.resized, strict=True))
    box = (left * across, top * down, right * across, bottom * down)
    shown = image.resize((right - left, bottom - top), FILTERS[transform.interpolation], box)
    return shown, (transform.corner[0] - left, transform.corner[1] - top)


def stretch(corner: int, shown: int, resized: int, original: int) -> tuple[int, int]:
    """First and last pixel of the resized side that its shown part depends on."""
    margin = math.ceil(MARGIN * max(1.0, resized / original))
    return max(corner - margin, 0), min(corner + shown + margin, resized)


def coloured(pixels: Pixels, colour: Colour | None) -> Pixels:
    """With another hue or gamma."""
    if colour is None:
        return pixels
    if colour.gamma != 1.0:
        return np.rint(255 * (np.arange(256) / 255) ** colour.gamma).astype(np.uint8)[pixels]
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    turned = hue.point([(level + round(colour.hue * 256)) % 256 for level in range(256)])
    return np.asarray(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))


def decode(data: bytes, path: str) -> Image.Image:
    """8-bit RGB, turned upright; alpha is dropped, not blended; greys, palettes and CMYK are converted."""
    return layers(data, path, alpha=False)[0]


def layers(data: bytes, path: str, *, alpha: bool) -> tuple[Image.Image, Image.Image | None]:
    """The upright picture as 8-bit RGB and, where it is wanted and there is one, its alpha channel.

    Of an animated image the first frame.
    """
    orientation = header_of(data, path).orientation
    try:
        with Image.open(BytesIO(data)) as image:
            opacity = alpha_of(image) if alpha else None
            upright = eight_bit_rgb(image)
    except DECODER_ERRORS as error:
        fix = "replace or remove it, or leave out what is bad with --on_bad_image skip"
        raise UserError(f"{path} is damaged ({error})", fix=fix) from error
    if orientation == 1:
        return upright, opacity
    turn = TURNS[orientation]
    return upright.transpose(turn), opacity.transpose(turn) if opacity is not None else None


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


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The alpha channel, or what a transparent colour makes of one; None where everything is opaque."""
    image.load()
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):
        opaque = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(opaque.astype(np.uint8) * 255)
    return image.convert("RGBA").getchannel("A")


def interpolation_for(image: Size, resized: Size, wanted: str | None) -> str:
    """The wanted filter, else area where no side grows and lanczos where one does.

    An area holds nothing to average where a side grows: there it is bilinear.
    """
    shrinks = resized[0] <= image[0] and resized[1] <= image[1]
    if wanted == "area" and not shrinks:
        return "bilinear"
    return wanted or ("area" if shrinks else "lanczos")


class Colour(NamedTuple):
    """A small change of the colours."""

    hue: float = 0.0  # turns of the colour wheel
    gamma: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What is done to the pixels; part of a cache entry's name."""

    resized: Size
    bucket: Size
    interpolation: str
    offset: Size | None = None  # left and top of the crop; None for the centre
    flip: bool = False
    colour: Colour | None = None

    @property
    def corner(self) -> Size:
        """Left and top of the crop."""
        return crop_offset(self.resized, self.bucket) if self.offset is None else self.offset

    @property
    def geometry(self) -> Transform:
        """What masks and control images share with their picture."""
        return self if self.colour is None else replace(self, colour=None)

    def name(self, size: Size) -> str:
        """The same for transforms that give the same pixels of pictures of this size."""
        resized, bucket, corner = (f"{x}x{y}" for x, y in (self.resized, self.bucket, self.corner))
        filtered = FILTERS["area" if size == self.resized else self.interpolation].name.lower()
        side = "flipped" if self.flip else "plain"
        colour = "" if self.colour is None else f"/hue{self.colour.hue}/gamma{self.colour.gamma}"
        return f"v{VERSION}/{resized}/{bucket}/{corner}/{filtered}/{side}{colour}"
