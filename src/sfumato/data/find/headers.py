"""An image's size and orientation from the first bytes of its file; fast for the usual formats, Pillow for the rest.

The decoder uses the same orientation, so sizes and pixels agree. What needs a plug-in of Pillow is told from here, too.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Callable
from importlib import import_module
from io import BytesIO
from typing import NamedTuple

from PIL import Image, features

from sfumato.data.find.headers_jxl import CONTAINER, START, of_jxl
from sfumato.errors import UserError

BINARY = os.O_BINARY if sys.platform == "win32" else 0  # for os.open
HEAD = 4096  # bytes read at once; the header of nearly every file lies within
SMALLEST_SIDE = 8  # one latent pixel
MOST_PIXELS = 178_956_970  # where Pillow suspects a decompression bomb
# What Pillow's readers raise on damaged files, found by damaging some 200,000.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

AVIF = "pip install --upgrade pillow"
JXL = 'pip install "sfumato[jxl]", or pip install pillow-jxl-plugin'
Read = Callable[[int, int], bytes]  # offset, count -> at most count bytes


class Header(NamedTuple):
    """Width and height as shown, that is, after turning by the EXIF orientation (1 to 8)."""

    width: int
    height: int
    orientation: int


def header_at(descriptor: int, path: str, size: int, start: int = 0) -> Header:
    """The header of an image of `size` bytes that begins at `start` of an open file.

    UserError, which names the path, where it is no image that can be trained on, or is cut short.
    """

    def read(offset: int, count: int) -> bytes:
        count = min(count, size - offset)
        if count <= 0:
            return b""
        os.lseek(descriptor, start + offset, os.SEEK_SET)  # os.pread is missing on Windows
        return os.read(descriptor, count)

    head = read(0, HEAD)
    header = parse(path, head, read)
    if not ends_well(head, size, read):
        check_pixels(path, read)
    return header


def header_of(data: bytes, path: str) -> Header:
    """The same from a file's whole content; the path is for messages."""
    return parse(path, data[:HEAD], lambda offset, count: data[offset : offset + count])


def parse(path: str, head: bytes, read: Read) -> Header:
    found = None
    try:
        if head.startswith(b"\xff\xd8\xff"):
            found = of_jpeg(head, read)
        elif head.startswith(b"\x89PNG\r\n\x1a\n"):
            found = of_png(head, read)
        elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            found = of_webp(head, read)
        elif head.startswith(b"BM"):
            found = of_bmp(head)
        elif head.startswith((START, CONTAINER)):
            needs_jxl(path)
            found = Header(*of_jxl(head, read))
    except (struct.error, IndexError):  # cut short, or not as expected
        found = None
    width, height, orientation = found or of_pillow(path, read)
    if min(width, height) < SMALLEST_SIDE:
        raise UserError(f"{path} is only {width}x{height} pixels", fix="replace or remove it")
    if width * height > MOST_PIXELS:
        raise UserError(f"{path} claims {width}x{height} pixels, more than any picture", fix="make it smaller")
    return Header(height, width, orientation) if orientation >= 5 else Header(width, height, orientation)


def of_jpeg(head: bytes, read: Read) -> Header | None:
    """Walk the segments up to the frame header; the bytes of a segment are read only where they matter."""
    start, orientation, offset = 0, 1, 2
    while True:
        if offset + 18 > start + len(head):
            start, head = offset, read(offset, HEAD)
        marker, kind, length = struct.unpack_from(">BBH", head, offset - start)
        if marker != 0xFF:
            return None
        if kind == 0xFF:  # padding
            offset += 1
        elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", head, offset - start + 5)
            return Header(width, height, orientation) if width and height else None
        elif kind == 0xDA:  # pixels without a frame header
            return None
        else:
            if kind == 0xE1 and orientation == 1 and head[offset - start + 4 : offset - start + 10] == b"Exif\0\0":
                orientation = of_exif(read(offset + 10, length - 8))
            offset += 2 + length


def of_png(head: bytes, read: Read) -> Header:
    """Size from the first chunk, orientation from an eXIf chunk before the pixels."""
    width, height = struct.unpack_from(">II", head, 16)
    start, offset = 0, 33
    while True:
        if offset + 8 > start + len(head):
            start, head = offset, read(offset, HEAD)
        length, kind = struct.unpack_from(">I4s", head, offset - start)
        if kind in (b"IDAT", b"IEND"):
            return Header(width, height, 1)
        if kind == b"eXIf":
            return Header(width, height, of_exif(read(offset + 8, length)))
        offset += 12 + length


def of_webp(head: bytes, read: Read) -> Header | None:
    kind = head[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return Header(width & 0x3FFF, height & 0x3FFF, 1)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1)
    if kind != b"VP8X":
        return None
    width = int.from_bytes(head[24:27], "little") + 1
    height = int.from_bytes(head[27:30], "little") + 1
    return Header(width, height, exif_of_webp(read) if head[20] & 8 else 1)


def exif_of_webp(read: Read) -> int:
    """The EXIF chunk comes after the pixels."""
    offset = 12
    while len(chunk := read(offset, 8)) == 8:
        kind, length = struct.unpack("<4sI", chunk)
        if kind == b"EXIF":
            return of_exif(read(offset + 8, length).removeprefix(b"Exif\0\0"))
        offset += 8 + length + length % 2
    return 1


def of_bmp(head: bytes) -> Header | None:
    """Height below 0 where the rows go from the top; None for the oldest kind of header."""
    (kind,) = struct.unpack_from("<I", head, 14)
    width, height = struct.unpack_from("<ii", head, 18)
    return Header(width, abs(height), 1) if kind >= 40 and width > 0 and height else None


def of_exif(tiff: bytes) -> int:
    """The orientation in the first directory of a TIFF structure; 1 where there is none."""
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


def of_pillow(path: str, read: Read) -> Header:
    """Any other format, and files that the quick readers do not understand."""
    data = whole(read)
    if not data:
        raise UserError(f"{path} is empty (0 bytes)", fix="replace or remove it")
    try:
        with Image.open(BytesIO(data)) as image:
            # Pillow turns TIFF by itself, size included.
            orientation = 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
            return Header(image.width, image.height, orientation if orientation in range(1, 9) else 1)
    except DECODER_ERRORS as error:
        if data[4:12] in (b"ftypavif", b"ftypavis") and not features.check("avif"):
            raise UserError(f"{path} is an AVIF image, which this Pillow cannot read", fix=AVIF) from error
        raise UserError(f"{path} is no image, or is damaged", fix="replace or remove it") from error


def needs_jxl(path: str) -> None:
    """Teach Pillow the format, here and for the decoder; UserError where the plug-in is missing."""
    try:
        import_module("pillow_jxl")
    except ImportError as error:
        raise UserError(f"{path} is a JPEG XL image, which needs a plug-in", fix=JXL) from error


def ends_well(head: bytes, size: int, read: Read) -> bool:
    """Whether the file ends as its format does, as nearly every whole file does and none that is cut short."""
    if head.startswith(b"\xff\xd8\xff"):
        return read(size - 2, 2) == b"\xff\xd9"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return read(size - 8, 4) == b"IEND"
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return True


def check_pixels(path: str, read: Read) -> None:
    """Decode everything: slow, and only for files that look cut short; some merely carry more at their end."""
    try:
        with Image.open(BytesIO(whole(read))) as image:
            image.load()
    except DECODER_ERRORS as error:
        raise UserError(f"{path} is damaged or cut short ({error})", fix="replace or remove it") from error


def whole(read: Read) -> bytes:
    blocks: list[bytes] = []
    while block := read(sum(map(len, blocks)), 1 << 22):
        blocks.append(block)
    return b"".join(blocks)
