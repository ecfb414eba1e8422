"""From the bytes of an image file to the pixels of its bucket: decode, rotate, resize, crop, flip, change color."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.common.files import read_file
from sfumato.data.buckets import Size, crop_offset
from sfumato.data.find.color_profiles import convert_to_srgb
from sfumato.data.find.gray_levels import is_deep_gray, to_eight_bits
from sfumato.data.find.headers import parse_image_header
from sfumato.data.find.image_formats import DECODER_ERRORS, open_image
from sfumato.errors import UserError

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB
Mask = NDArray[np.uint8]  # (height, width), 255 where the loss has full weight

RESAMPLING_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "box": Image.Resampling.BOX,
}
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WINDOW_FACTOR = 8  # resized area / bucket area, above which only a window around the crop is resized
WINDOW_MARGIN = 4  # pixels of the image or of the result, whichever are larger: more than any filter reaches
PREPARE_VERSION = 1  # part of the cache keys; raised when the pixels of `prepare_pixels` change


def hash_content(data: bytes) -> bytes:
    """The part of a cache key that stands for an image file, independent of its path."""
    return hashlib.blake2b(data, digest_size=20).digest()


def prepare_pixels(data: bytes, transform: Transform, *, size: Size, path: str) -> Pixels:
    """The pixels of a bucket, uint8 (H, W, 3).

    size: width and height for which the transform was chosen; path: for messages. UserError if the file is damaged or
    has another size now.
    """
    image, _ = decode_layers(data, path, alpha=False)
    return change_color(resize_and_crop(check_image_size(image, size, path), transform), transform.color)


def prepare_with_alpha(data: bytes, transform: Transform, *, size: Size, path: str) -> tuple[Pixels, Mask]:
    """The pixels, and the alpha channel with the same geometry; all 255 for an image without one."""
    image, alpha = decode_layers(data, path, alpha=True)
    pixels = change_color(resize_and_crop(check_image_size(image, size, path), transform), transform.color)
    return pixels, np.full(pixels.shape[:2], 255, np.uint8) if alpha is None else resize_and_crop(alpha, transform)


def prepare_mask(data: bytes, transform: Transform, *, size: Size, path: str) -> Mask:
    """The red channel of a mask image with the geometry of the pixels; gray images are converted to RGB.

    Its numbers are weights, not colors: an embedded color profile is ignored.
    """
    image, _ = decode_layers(data, path, alpha=False, to_srgb=False)
    return resize_and_crop(check_image_size(image, size, path).getchannel("R"), transform)


def check_image_size(image: Image.Image, size: Size, path: str) -> Image.Image:
    """The image itself; UserError if its size changed since the run started."""
    if image.size != size:
        raise UserError(
            f"{path} now has {image.size[0]}x{image.size[1]} pixels, but had {size[0]}x{size[1]} at the start",
            code="image-size-changed",
            fix="start the run again, or skip such images with --on_bad_image skip",
        )
    return image


def resize_and_crop(image: Image.Image, transform: Transform) -> NDArray[np.uint8]:
    """Resize, crop and flip; an image of another size with the same aspect ratio gets the same pixels."""
    left, top = transform.corner
    width, height = transform.bucket
    if transform.resized[0] * transform.resized[1] > WINDOW_FACTOR * width * height:
        image, (left, top) = resize_window(image, transform)
    elif image.size != transform.resized:
        image = image.resize(transform.resized, RESAMPLING_FILTERS[transform.interpolation])
    pixels = np.asarray(image)[top : top + height, left : left + width]
    return np.ascontiguousarray(pixels[:, ::-1] if transform.flip else pixels)


def resize_window(image: Image.Image, transform: Transform) -> tuple[Image.Image, Size]:
    """A part of the resized image around the crop, and (left, top) of the crop in it.

    Saves memory: all of an image of 30000x10 pixels that covers 1024x1024 would take ten gigabytes.
    """
    (left, right), (top, bottom) = map(
        find_window_range, transform.corner, transform.bucket, transform.resized, image.size
    )
    across, down = (old / new for old, new in zip(image.size, transform.resized, strict=True))
    box = (left * across, top * down, right * across, bottom * down)
    window = image.resize((right - left, bottom - top), RESAMPLING_FILTERS[transform.interpolation], box)
    return window, (transform.corner[0] - left, transform.corner[1] - top)


def find_window_range(corner: int, length: int, resized: int, original: int) -> tuple[int, int]:
    """First and last pixel of a resized side on which the crop, `length` pixels from `corner` on, depends."""
    margin = math.ceil(WINDOW_MARGIN * max(1.0, resized / original))
    return max(corner - margin, 0), min(corner + length + margin, resized)


def change_color(pixels: Pixels, color: ColorChange | None) -> Pixels:
    """Change the gamma, or shift the hue."""
    if color is None:
        return pixels
    if color.gamma != 1.0:
        return np.rint(255 * (np.arange(256) / 255) ** color.gamma).astype(np.uint8)[pixels]
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    shifted = hue.point([(level + round(color.hue * 256)) % 256 for level in range(256)])
    return np.asarray(Image.merge("HSV", (shifted, saturation, value)).convert("RGB"))


def decode_image(data: bytes, path: str) -> Image.Image:
    """8-bit RGB in sRGB, rotated by its EXIF orientation; alpha is dropped, not blended; other modes are converted."""
    return decode_layers(data, path, alpha=False)[0]


def read_image(path: Path) -> Image.Image:
    """The image of a file as `decode_image` gives it. UserError where it cannot be read."""
    try:
        data = read_file(path)
    except OSError as error:
        raise UserError(
            f"the image {path} cannot be read ({error.strerror})", code="prompt-image-unreadable", fix="check the path"
        ) from error
    return decode_image(data, str(path))


def decode_layers(
    data: bytes, path: str, *, alpha: bool, to_srgb: bool = True
) -> tuple[Image.Image, Image.Image | None]:
    """The image as 8-bit RGB, rotated by its EXIF orientation, and its alpha channel if `alpha` and there is one.

    Of an animated image the first frame. to_srgb: convert it by its embedded color profile. UserError if the file is
    damaged.
    """
    orientation = parse_image_header(data, path).orientation
    try:
        with open_image(BytesIO(data)) as image:
            image.load()
            opacity = extract_alpha(image) if alpha else None
            upright = convert_to_rgb(image, path, to_srgb=to_srgb)
    except DECODER_ERRORS as error:
        raise UserError(
            f"{path} is damaged ({error})",
            code="image-decode-failed",
            fix="replace or remove it, or skip bad images with --on_bad_image skip",
        ) from error
    if orientation == 1:
        return upright, opacity
    method = TRANSPOSES[orientation]
    return upright.transpose(method), opacity.transpose(method) if opacity is not None else None


def convert_to_rgb(image: Image.Image, path: str, *, to_srgb: bool) -> Image.Image:
    """8-bit RGB without alpha. UserError where the range of the values is not known."""
    if is_deep_gray(image.mode):
        image = to_eight_bits(image, path)
    converted = convert_to_srgb(image) if to_srgb else None
    if converted is not None or image.mode == "RGB":
        return converted or image
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def extract_alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel, also of a transparent color; None if the image is opaque."""
    if not image.has_transparency_data:
        return None
    if is_deep_gray(image.mode):
        opaque = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(opaque.astype(np.uint8) * 255)
    return image.convert("RGBA").getchannel("A")


def choose_interpolation(image: Size, resized: Size, wanted: str | None) -> str:
    """The wanted filter; by default area if no side grows, else lanczos.

    If a side grows, area has nothing to average and becomes bilinear.
    """
    shrinks = resized[0] <= image[0] and resized[1] <= image[1]
    if wanted == "area" and not shrinks:
        return "bilinear"
    return wanted or ("area" if shrinks else "lanczos")


class ColorChange(NamedTuple):
    """A small change of the colors."""

    hue: float = 0.0  # turns of the color wheel
    gamma: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Geometry and color change of an image; part of its cache key."""

    resized: Size
    bucket: Size
    interpolation: str
    offset: Size | None = None  # left and top of the crop; None for the center
    flip: bool = False
    color: ColorChange | None = None

    @property
    def corner(self) -> Size:
        """Left and top of the crop."""
        return crop_offset(self.resized, self.bucket) if self.offset is None else self.offset

    @property
    def geometry(self) -> Transform:
        """The part of the transform that masks and control images share with their image."""
        return self if self.color is None else replace(self, color=None)

    def cache_name(self, size: Size) -> str:
        """Equal for transforms that give the same pixels for images of this size; stored caches depend on it."""
        resized, bucket, corner = (f"{x}x{y}" for x, y in (self.resized, self.bucket, self.corner))
        resampling = RESAMPLING_FILTERS["area" if size == self.resized else self.interpolation].name.lower()
        side = "flipped" if self.flip else "plain"
        color = "" if self.color is None else f"/hue{self.color.hue}/gamma{self.color.gamma}"
        return f"v{PREPARE_VERSION}/{resized}/{bucket}/{corner}/{resampling}/{side}{color}"
