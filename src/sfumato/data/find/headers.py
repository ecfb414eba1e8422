"""An image's size and orientation from the first bytes of its file: a fast parser for PNG, JPEG, WebP and JPEG XL.

Pillow reads every other format. The decoder uses the same orientation, so sizes and pixels agree.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from importlib import import_module
from io import BytesIO
from typing import NamedTuple

from PIL import Image, features

from sfumato.data.find.headers_jxl import CONTAINER, START, parse_jxl
from sfumato.errors import UserError

HEAD_BYTES = 4096  # read at once; the header of nearly every file is within
MIN_SIDE = 8  # pixels: one latent pixel
MAX_PIXELS = 178_956_970  # from which on Pillow suspects a decompression bomb
# What Pillow's readers raise on damaged files, collected by damaging some 200,000.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RuntimeError,  # of AVIF's decoder, and NotImplementedError of others
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

MAX_SEGMENTS = 10_000  # before the size: real files have a few dozen, hostile ones millions
REPLACE_FIX = "replace or remove it"
AVIF_FIX = "pip install --upgrade pillow"
JXL_FIX = 'pip install "sfumato[jxl]", or pip install pillow-jxl-plugin'
ReadAt = Callable[[int, int], bytes]  # offset, count -> at most count bytes


class EndlessHeaderError(Exception):
    """A header of more segments than any real one."""


class ImageHeader(NamedTuple):
    """Width and height in pixels after the EXIF orientation (1 to 8) is applied."""

    width: int
    height: int
    orientation: int


def read_image_header(descriptor: int, path: str, size: int, start: int = 0) -> ImageHeader:
    """The header of an image of `size` bytes that begins at byte `start` of an open file.

    UserError where it is no image, is too small or too large to train on, or is cut short. path: for messages.
    """

    def read(offset: int, count: int) -> bytes:
        count = min(count, size - offset)
        if count <= 0:
            return b""
        os.lseek(descriptor, start + offset, os.SEEK_SET)  # os.pread is missing on Windows
        return os.read(descriptor, count)

    head = read(0, HEAD_BYTES)
    header = parse_head(path, head, read)
    if not has_end_marker(head, size, read):
        check_decodable(path, read)
    return header


def parse_image_header(data: bytes, path: str) -> ImageHeader:
    """The header of an image file with this content. path: for messages."""
    return parse_head(path, data[:HEAD_BYTES], lambda offset, count: data[offset : offset + count])


def parse_head(path: str, head: bytes, read: ReadAt) -> ImageHeader:
    header = None
    try:
        if head.startswith(b"\xff\xd8\xff"):
            header = parse_jpeg(head, read)
        elif head.startswith(b"\x89PNG\r\n\x1a\n"):
            header = parse_png(head, read)
        elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            header = parse_webp(head, read)
        elif head.startswith((START, CONTAINER)):
            import_jxl_plugin(path)
            header = ImageHeader(*parse_jxl(head, read))
    except EndlessHeaderError as error:
        raise UserError(
            f"{path} has more than {MAX_SEGMENTS} pieces before its size", code="image-header-endless", fix=REPLACE_FIX
        ) from error
    except (struct.error, IndexError):  # cut short, or not as expected
        header = None
    width, height, orientation = header or parse_with_pillow(path, read)
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{path} is only {width}x{height} pixels", code="image-too-small", fix=REPLACE_FIX)
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path} claims {width}x{height} pixels, more than {MAX_PIXELS}",
            code="image-too-large",
            fix="make it smaller",
        )
    return ImageHeader(height, width, orientation) if orientation >= 5 else ImageHeader(width, height, orientation)


def parse_jpeg(head: bytes, read: ReadAt) -> ImageHeader | None:
    """Goes through the segments up to the frame header; reads the content of EXIF segments only."""
    start, orientation, offset = 0, 1, 2
    for _ in range(MAX_SEGMENTS):
        if offset + 18 > start + len(head):
            start, head = offset, read(offset, HEAD_BYTES)
        marker, kind, length = struct.unpack_from(">BBH", head, offset - start)
        if marker != 0xFF:
            return None
        if kind == 0xFF:  # padding
            offset += 1
        elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", head, offset - start + 5)
            return ImageHeader(width, height, orientation) if width and height else None
        elif kind == 0xDA:  # pixels without a frame header
            return None
        else:
            if kind == 0xE1 and orientation == 1 and head[offset - start + 4 : offset - start + 10] == b"Exif\0\0":
                orientation = parse_orientation(read(offset + 10, length - 8))
            offset += 2 + length
    raise EndlessHeaderError


def parse_png(head: bytes, read: ReadAt) -> ImageHeader:
    """Size from the first chunk, orientation from an eXIf chunk before the pixels."""
    width, height = struct.unpack_from(">II", head, 16)
    start, offset = 0, 33
    for _ in range(MAX_SEGMENTS):
        if offset + 8 > start + len(head):
            start, head = offset, read(offset, HEAD_BYTES)
        length, kind = struct.unpack_from(">I4s", head, offset - start)
        if kind in (b"IDAT", b"IEND"):
            return ImageHeader(width, height, 1)
        if kind == b"eXIf":
            return ImageHeader(width, height, parse_orientation(read(offset + 8, length)))
        offset += 12 + length
    raise EndlessHeaderError


def parse_webp(head: bytes, read: ReadAt) -> ImageHeader | None:
    kind = head[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return ImageHeader(width & 0x3FFF, height & 0x3FFF, 1)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return ImageHeader((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1)
    if kind != b"VP8X":
        return None
    width = int.from_bytes(head[24:27], "little") + 1
    height = int.from_bytes(head[27:30], "little") + 1
    return ImageHeader(width, height, parse_webp_orientation(read) if head[20] & 8 else 1)


def parse_webp_orientation(read: ReadAt) -> int:
    """The orientation in the EXIF chunk, which comes after the pixels."""
    offset = 12
    for _ in range(MAX_SEGMENTS):
        if len(chunk := read(offset, 8)) < 8:
            return 1
        kind, length = struct.unpack("<4sI", chunk)
        if kind == b"EXIF":
            return parse_orientation(read(offset + 8, length).removeprefix(b"Exif\0\0"))
        offset += 8 + length + length % 2
    raise EndlessHeaderError


def parse_orientation(tiff: bytes) -> int:
    """The orientation in the first directory of a TIFF structure (EXIF); 1 where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    if directory + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, directory)
    for offset in range(directory + 2, min(directory + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, offset)
        if tag == 0x0112 and kind == 3:
            (orientation,) = struct.unpack_from(order + "H", tiff, offset + 8)
            return orientation if 1 <= orientation <= 8 else 1
    return 1


def parse_with_pillow(path: str, read: ReadAt) -> ImageHeader:
    """Any other format, and files that the fast parsers do not understand."""
    data = read_all(read)
    if not data:
        raise UserError(f"{path} is empty (0 bytes)", code="image-file-empty", fix=REPLACE_FIX)
    try:
        with Image.open(BytesIO(data)) as image:
            # Pillow applies the orientation of TIFF files itself, size included.
            orientation = 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
            return ImageHeader(image.width, image.height, orientation if orientation in range(1, 9) else 1)
    except DECODER_ERRORS as error:
        if data[4:12] in (b"ftypavif", b"ftypavis") and not features.check("avif"):
            raise UserError(
                f"{path} is an AVIF image, which this Pillow cannot read", code="avif-unsupported", fix=AVIF_FIX
            ) from error
        raise UserError(f"{path} is no image, or is damaged", code="image-header-damaged", fix=REPLACE_FIX) from error


def import_jxl_plugin(path: str) -> None:
    """Register JPEG XL in Pillow, for the decoder, too; UserError where the plugin is missing."""
    try:
        import_module("pillow_jxl")
    except ImportError as error:
        raise UserError(
            f"{path} is a JPEG XL image, which needs a Pillow plugin", code="jxl-plugin-missing", fix=JXL_FIX
        ) from error


def has_end_marker(head: bytes, size: int, read: ReadAt) -> bool:
    """Whether the file ends as its format requires: true of nearly every complete file, of none that is cut short."""
    if head.startswith(b"\xff\xd8\xff"):
        return read(size - 2, 2) == b"\xff\xd9"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return read(size - 8, 4) == b"IEND"
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return True


def check_decodable(path: str, read: ReadAt) -> None:
    """Decode the whole image: slow, and only for files that look cut short; some just have data after their end."""
    try:
        with Image.open(BytesIO(read_all(read))) as image:
            image.load()
    except DECODER_ERRORS as error:
        raise UserError(
            f"{path} is damaged or cut short ({error})", code="image-file-cut-short", fix=REPLACE_FIX
        ) from error


def read_all(read: ReadAt) -> bytes:
    blocks: list[bytes] = []
    while block := read(sum(map(len, blocks)), 1 << 22):
        blocks.append(block)
    return b"".join(blocks)
