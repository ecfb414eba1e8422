"""An image's size, orientation and traits from the first bytes of its file: fast parsers for PNG, JPEG, WebP, JPEG XL.

Pillow reads every other format. The decoder uses the same orientation, so sizes and pixels agree.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from io import BufferedReader, BytesIO, RawIOBase
from typing import Any, NamedTuple

from PIL import Image

from sfumato.data.find.color_profiles import classify_profile
from sfumato.data.find.headers_jxl import CONTAINER, START, parse_jxl
from sfumato.data.find.image_formats import DECODER_ERRORS, describe_foreign_file, import_plugin, open_image
from sfumato.data.find.traits import ALPHA, BROKEN_PROFILE, CONVERTED, FRAMES, PLAIN, UNKNOWN_PROFILE, Traits
from sfumato.errors import UserError

HEAD_BYTES = 4096  # read at once; the header of nearly every file is within
MIN_SIDE = 8  # pixels: one latent pixel
MAX_PIXELS = 178_956_970  # from which on Pillow suspects a decompression bomb
MAX_SEGMENTS = 10_000  # before the size: real files have a few dozen, hostile ones millions
REPLACE_FIX = "replace or remove it"
PNG_CHUNK_TRAITS = {b"tRNS": ALPHA, b"acTL": FRAMES, b"iCCP": UNKNOWN_PROFILE}
FORMATS_WITH_FRAMES = frozenset({"GIF", "TIFF", "AVIF", "PNG", "WEBP"})  # not the previews in JPEGs of cameras
WEBP_FLAG_TRAITS = {0x20: UNKNOWN_PROFILE, 0x10: ALPHA, 0x02: FRAMES}
ReadAt = Callable[[int, int], bytes]  # offset, count -> at most count bytes


class EndlessHeaderError(Exception):
    """A header of more segments than any real one."""


class ImageHeader(NamedTuple):
    """Width and height in pixels after the EXIF orientation (1 to 8) is applied, and what else the header shows."""

    width: int
    height: int
    orientation: int
    traits: Traits


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
    header = parse_head(path, head, read, size)
    if not has_end_marker(head, size, read):
        check_decodable(path, read)
    if header.traits & UNKNOWN_PROFILE:
        return header._replace(traits=find_profile_traits(header.traits, read, size))
    return header


def parse_image_header(data: bytes, path: str) -> ImageHeader:
    """The header of an image file with this content, without a look at its color profile. path: for messages."""
    return parse_head(path, data[:HEAD_BYTES], lambda offset, count: data[offset : offset + count], len(data))


def parse_head(path: str, head: bytes, read: ReadAt, size: int) -> ImageHeader:
    plugin = import_plugin(head, path)
    header = None
    try:
        if head.startswith(b"\xff\xd8\xff"):
            header = parse_jpeg(head, read)
        elif head.startswith(b"\x89PNG\r\n\x1a\n"):
            header = parse_png(head, read)
        elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            header = parse_webp(head, read)
        elif head.startswith((START, CONTAINER)):
            header = ImageHeader(*parse_jxl(head, read))
    except EndlessHeaderError as error:
        raise UserError(
            f"{path} has more than {MAX_SEGMENTS} pieces before its size", code="image-header-endless", fix=REPLACE_FIX
        ) from error
    except (struct.error, IndexError):  # cut short, or not as expected
        header = None
    width, height, orientation, traits = header or parse_with_pillow(path, head, read, size)
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{path} is only {width}x{height} pixels", code="image-too-small", fix=REPLACE_FIX)
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path} claims {width}x{height} pixels, more than {MAX_PIXELS}",
            code="image-too-large",
            fix="make it smaller",
        )
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(width, height, orientation, traits | plugin)


def parse_jpeg(head: bytes, read: ReadAt) -> ImageHeader | None:
    """Goes through the segments up to the frame header; reads the content of EXIF segments only."""
    start, orientation, traits, offset = 0, 1, PLAIN, 2
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
            return ImageHeader(width, height, orientation, traits) if width and height else None
        elif kind == 0xDA:  # pixels without a frame header
            return None
        else:
            if kind == 0xE1 and orientation == 1 and head[offset - start + 4 : offset - start + 10] == b"Exif\0\0":
                orientation = parse_orientation(read(offset + 10, length - 8))
            elif kind == 0xE2 and head[offset - start + 4 : offset - start + 15] == b"ICC_PROFILE":
                traits |= UNKNOWN_PROFILE
            offset += 2 + length
    raise EndlessHeaderError


def parse_png(head: bytes, read: ReadAt) -> ImageHeader:
    """Size from the first chunk, orientation from an eXIf chunk before the pixels."""
    width, height, _, color_type = struct.unpack_from(">IIBB", head, 16)
    orientation, traits = 1, ALPHA if color_type in (4, 6) else PLAIN
    start, offset = 0, 33
    for _ in range(MAX_SEGMENTS):
        if offset + 8 > start + len(head):
            start, head = offset, read(offset, HEAD_BYTES)
        length, kind = struct.unpack_from(">I4s", head, offset - start)
        if kind in (b"IDAT", b"IEND"):
            return ImageHeader(width, height, orientation, traits)
        if kind == b"eXIf":
            orientation = parse_orientation(read(offset + 8, length))
        traits |= PNG_CHUNK_TRAITS.get(kind, PLAIN)
        offset += 12 + length
    raise EndlessHeaderError


def parse_webp(head: bytes, read: ReadAt) -> ImageHeader | None:
    kind = head[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return ImageHeader(width & 0x3FFF, height & 0x3FFF, 1, PLAIN)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        alpha = ALPHA if bits >> 28 & 1 else PLAIN
        return ImageHeader((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1, alpha)
    if kind != b"VP8X":
        return None
    width = int.from_bytes(head[24:27], "little") + 1
    height = int.from_bytes(head[27:30], "little") + 1
    traits = PLAIN
    for flag, trait in WEBP_FLAG_TRAITS.items():
        traits |= trait if head[20] & flag else PLAIN
    return ImageHeader(width, height, parse_webp_orientation(read) if head[20] & 8 else 1, traits)


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


def parse_with_pillow(path: str, head: bytes, read: ReadAt, size: int) -> ImageHeader:
    """Any other format, and files that the fast parsers do not understand."""
    if not head:
        raise UserError(f"{path} is empty (0 bytes)", code="image-file-empty", fix=REPLACE_FIX)
    try:
        with open_image(open_at(read, size)) as image:
            # Pillow applies the orientation of TIFF files itself, size included.
            orientation = 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
            orientation = orientation if orientation in range(1, 9) else 1
            return ImageHeader(image.width, image.height, orientation, find_traits(image))
    except DECODER_ERRORS as error:
        what = describe_foreign_file(head) or "no image, or is damaged"
        raise UserError(f"{path} is {what}", code="image-header-damaged", fix=REPLACE_FIX) from error


def find_traits(image: Image.Image) -> Traits:
    """The traits of an open image."""
    traits = ALPHA if image.has_transparency_data else PLAIN
    if image.format in FORMATS_WITH_FRAMES and image.is_animated:  # pyright: ignore[reportAttributeAccessIssue]
        traits |= FRAMES
    return traits | UNKNOWN_PROFILE if "icc_profile" in image.info else traits


def find_profile_traits(traits: Traits, read: ReadAt, size: int) -> Traits:
    """The traits with what the embedded profile is; a file that cannot be opened is reported when it is decoded."""
    traits &= ~UNKNOWN_PROFILE
    try:
        with open_image(open_at(read, size)) as image:
            found, kind = find_traits(image) & ~UNKNOWN_PROFILE, classify_profile(image)
    except DECODER_ERRORS:
        return traits
    return traits | found | {"other": CONVERTED, "broken": BROKEN_PROFILE}.get(kind, PLAIN)


def open_at(read: ReadAt, size: int) -> BufferedReader:
    return BufferedReader(PartialFile(read, size), HEAD_BYTES)


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
        with open_image(BytesIO(read_all(read))) as image:
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


class PartialFile(RawIOBase):
    """A file for a decoder, of which no more is read than the decoder asks for."""

    def __init__(self, read: ReadAt, size: int) -> None:
        self._read_at = read
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to byte {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
