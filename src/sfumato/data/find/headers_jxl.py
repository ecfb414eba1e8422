"""Size and orientation of a JPEG XL file from its first bytes (ISO/IEC 18181-1: size header, image metadata).

Pillow's plugin decodes the whole image to learn its size (280 ms for 12 megapixels), and the EXIF orientation it gives
is not the one that the decoder applies.
"""

from __future__ import annotations

from collections.abc import Callable

START = b"\xff\x0a"
CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
CODESTREAM_BYTES = 64  # of the codestream's start, which hold everything that is read
ASPECT_RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width to height
MAX_BOXES = 1000  # real files have a few
SIDE_BITS = (9, 13, 18, 30)  # for a side of 1 to 2**bits pixels


def parse_jxl(head: bytes, read: Callable[[int, int], bytes]) -> tuple[int, int, int]:
    """Width, height and EXIF orientation of the decoder's output; IndexError where the file is cut short.

    Decoders apply the orientation, except to a recompressed JPEG, which they restore as it was.
    """
    if head.startswith(START):
        codestream, is_jpeg = head[:CODESTREAM_BYTES], False
    else:
        codestream, is_jpeg = find_codestream(read)
    bits = BitReader(codestream[len(START) :])
    width, height = parse_size(bits)
    orientation = 1
    if not bits.read(1) and bits.read(1):  # not all at their defaults, and the extra fields are there
        orientation = bits.read(3) + 1
    if is_jpeg:
        return width, height, orientation
    return (height, width, 1) if orientation >= 5 else (width, height, 1)


def parse_size(bits: BitReader) -> tuple[int, int]:
    in_blocks = bits.read(1)
    height = parse_side(bits, in_blocks)
    ratio = bits.read(3)
    if ratio == 0:
        return parse_side(bits, in_blocks), height
    across, down = ASPECT_RATIOS[ratio - 1]
    return height * across // down, height


def parse_side(bits: BitReader, in_blocks: int) -> int:
    """A side in pixels. in_blocks: whether it is stored in units of 8 pixels."""
    return (bits.read(5) + 1) * 8 if in_blocks else bits.read(SIDE_BITS[bits.read(2)]) + 1


def find_codestream(read: Callable[[int, int], bytes]) -> tuple[bytes, bool]:
    """The start of the codestream in a container, and whether the container holds a recompressed JPEG."""
    offset, codestream, is_jpeg = 0, b"", False
    for _ in range(MAX_BOXES):
        if len(box := read(offset, 16)) < 8 or (codestream and is_jpeg):
            break
        length, kind, start = int.from_bytes(box[:4], "big"), box[4:8], 8
        if length == 1:
            length, start = int.from_bytes(box[8:16], "big"), 16
        is_jpeg = is_jpeg or kind == b"jbrd"
        if kind in (b"jxlc", b"jxlp") and not codestream:
            counter_bytes = 4 if kind == b"jxlp" else 0
            codestream = read(offset + start + counter_bytes, CODESTREAM_BYTES)
        if length < start:  # 0: up to the end of the file
            break
        offset += length
    return codestream, is_jpeg


class BitReader:
    """Reads a number of bits at a time, the lowest first."""

    def __init__(self, data: bytes) -> None:
        self.bits_left = len(data) * 8
        self.value = int.from_bytes(data, "little")

    def read(self, count: int) -> int:
        """The next `count` bits; IndexError where fewer are left."""
        if count > self.bits_left:
            raise IndexError("cut short")
        bits = self.value & ((1 << count) - 1)
        self.value >>= count
        self.bits_left -= count
        return bits
