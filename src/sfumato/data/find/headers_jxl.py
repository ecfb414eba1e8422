"""The size and orientation in the first bits of a JPEG XL file (ISO/IEC 18181-1, size header and image metadata)."""

from __future__ import annotations

from collections.abc import Callable

START = b"\xff\x0a"
CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
ENOUGH = 64  # bytes of the codestream that hold all of it
RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width to height
SIDES = (9, 13, 18, 30)  # bits of a side of 1 to 2**bits pixels


def of_jxl(head: bytes, read: Callable[[int, int], bytes]) -> tuple[int, int, int]:
    """Width, height and EXIF orientation as the decoder will give them; IndexError where the file is cut short.

    Decoders turn the picture by themselves, except where it is a JPEG in disguise that they give back as it was.
    """
    codestream, is_jpeg = (head[:ENOUGH], False) if head.startswith(START) else of_boxes(read)
    bits = Bits(codestream[len(START) :])
    width, height = size_of(bits)
    orientation = 1
    if not bits.take(1) and bits.take(1):  # not all at their defaults, and the rarer fields are there
        orientation = bits.take(3) + 1
    if is_jpeg:
        return width, height, orientation
    return (height, width, 1) if orientation >= 5 else (width, height, 1)


def size_of(bits: Bits) -> tuple[int, int]:
    by_eight = bits.take(1)
    height = side_of(bits, by_eight)
    ratio = bits.take(3)
    if ratio == 0:
        return side_of(bits, by_eight), height
    across, down = RATIOS[ratio - 1]
    return height * across // down, height


def side_of(bits: Bits, by_eight: int) -> int:
    return (bits.take(5) + 1) * 8 if by_eight else bits.take(SIDES[bits.take(2)]) + 1


def of_boxes(read: Callable[[int, int], bytes]) -> tuple[bytes, bool]:
    """The start of the codestream in a container, and whether what a JPEG needs to be restored is there, too."""
    offset, codestream = 0, b""
    while len(box := read(offset, 16)) >= 8:
        length, kind, start = int.from_bytes(box[:4], "big"), box[4:8], 8
        if length == 1:
            length, start = int.from_bytes(box[8:16], "big"), 16
        if kind == b"jbrd":
            return codestream or of_boxes_after(read, offset + length), True
        if kind in (b"jxlc", b"jxlp") and not codestream:  # the second is numbered
            codestream = read(offset + start + (4 if kind == b"jxlp" else 0), ENOUGH)
        if length < start:  # 0: up to the end of the file
            break
        offset += length
    return codestream, False


def of_boxes_after(read: Callable[[int, int], bytes], offset: int) -> bytes:
    return of_boxes(lambda start, count: read(offset + start, count))[0]


class Bits:
    """Reads a number of bits at a time, the lowest first."""

    def __init__(self, data: bytes) -> None:
        self.left = len(data) * 8
        self.value = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        if count > self.left:
            raise IndexError("cut short")
        taken = self.value & ((1 << count) - 1)
        self.value >>= count
        self.left -= count
        return taken
