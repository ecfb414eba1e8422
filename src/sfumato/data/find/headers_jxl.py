"""Size, orientation and traits of a JPEG XL file from its first bytes (ISO/IEC 18181-1: size header, image metadata).

Pillow's plugin decodes the whole image to learn its size (280 ms for 12 megapixels), and the EXIF orientation it gives
is not the one that the decoder applies.
"""

from __future__ import annotations

from collections.abc import Callable

from sfumato.data.find.traits import ALPHA, FRAMES, PLAIN, UNKNOWN_PROFILE, Traits

START = b"\xff\x0a"
CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
CODESTREAM_BYTES = 64  # of the codestream's start, which hold everything that is read
ASPECT_RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width to height
MAX_BOXES = 1000  # real files have a few
SIDE_BITS = (9, 13, 18, 30)  # for a side of 1 to 2**bits pixels


def parse_jxl(head: bytes, read: Callable[[int, int], bytes]) -> tuple[int, int, int, Traits]:
    """Width, height, EXIF orientation and traits of the decoder's output; IndexError where the file is cut short.

    Decoders apply the orientation, except to a recompressed JPEG, which they restore as it was.
    """
    if head.startswith(START):
        codestream, is_jpeg = head[:CODESTREAM_BYTES], False
    else:
        codestream, is_jpeg = find_codestream(read)
    bits = BitReader(codestream[len(START) :])
    width, height = parse_size(bits)
    orientation, traits = parse_metadata(bits)
    if is_jpeg:
        return width, height, orientation, traits
    return (height, width, 1, traits) if orientation >= 5 else (width, height, 1, traits)


def parse_metadata(bits: BitReader) -> tuple[int, Traits]:
    """Orientation and traits; where fields follow that are rare, the profile is called unknown."""
    if bits.read(1):  # everything at its default
        return 1, PLAIN
    orientation = 1
    if bits.read(1):
        orientation = bits.read(3) + 1
        if bits.read(1) or bits.read(1):  # another size to show it at, or a preview
            return orientation, UNKNOWN_PROFILE
        if bits.read(1):
            return orientation, FRAMES | UNKNOWN_PROFILE
    skip_bit_depth(bits)
    bits.read(1)  # whether 16-bit buffers suffice
    extra_channels = bits.read(2)  # none, one, or more, whose number follows
    if extra_channels > 1 or (extra_channels and not bits.read(1)):
        return orientation, UNKNOWN_PROFILE
    bits.read(1)  # whether colors are stored as XYB
    traits = ALPHA if extra_channels else PLAIN
    return orientation, traits if bits.read(1) else traits | UNKNOWN_PROFILE


def skip_bit_depth(bits: BitReader) -> None:
    is_float, choice = bits.read(1), bits.read(2)
    bits.read((6 if choice == 3 else 0) + (4 if is_float else 0))


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
