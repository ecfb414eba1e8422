"""Sizes from image headers, compared with what the decoders of the formats give for the same bytes."""

from __future__ import annotations

import contextlib
import time
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from data.conftest import make_image
from sfumato.data.find.headers import parse_image_header
from sfumato.data.find.headers_jxl import BitReader, parse_jxl
from sfumato.data.images import decode_image
from sfumato.errors import UserError

# The first bytes of files that libjxl wrote (through pillow-jxl-plugin 1.3.8), and the size it gave back on opening.
JXL = {
    "ff0a05c800138802001401b59f200000": (40, 24, 1),
    "ff0a6002980e0013880200b8c00a0c00": (333, 77, 1),
    "ff0a98af010013880200b0c2160c0000": (600, 500, 1),
    "ff0a98004f4618001388020068402334": (9000, 20, 1),
    "ff0a4f06002d880200bd46b59f200000": (64, 64, 1),
    "ff0a3a1f1a002d88020084e0d11f5023": (1200, 1000, 1),
    "ff0a1a1c1d002d8802008460e7295043": (1600, 900, 1),
    "ff0aba5d1b002d88020084a01e992016": (4000, 3000, 1),
}
# A JPEG of 40x24 pixels with orientation 6, recompressed without loss: decoded, it is the JPEG again, not rotated.
BOXES = "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20"
STREAM = "000000136a786c7000000000ff0a0588056202"
JPEG = BOXES + STREAM + "000000106a627264c070db008220082d"
# The same without what restores the JPEG: the decoder rotates it.
ROTATED = BOXES + STREAM + "00000010" + b"jxlp".hex() + "80000001e05b0210"


def parse(data: bytes) -> tuple[int, int, int]:
    """Width, height and orientation."""
    return parse_jxl(data, lambda offset, count: data[offset : offset + count])[:3]


@pytest.mark.parametrize("start", JXL)
def test_sizes_of_jpeg_xl(start):
    assert parse(bytes.fromhex(start) + bytes(64)) == JXL[start]


def test_only_a_recompressed_jpeg_keeps_its_orientation():
    assert parse(bytes.fromhex(JPEG)) == (40, 24, 6)
    assert parse(bytes.fromhex(ROTATED)) == (24, 40, 1)


def test_the_jpeg_box_may_come_first():
    jpeg_first = BOXES + "000000106a627264c070db008220082d" + STREAM
    assert parse(bytes.fromhex(jpeg_first)) == (40, 24, 6)


@given(st.binary(max_size=40), st.sampled_from([b"\xff\x0a", bytes.fromhex(BOXES)]))
def test_any_bytes_are_a_jxl_header_or_cut_short(data, start):
    try:
        width, height, orientation = parse(start + data)
    except IndexError:
        return
    assert width >= 1
    assert height >= 1
    assert 1 <= orientation <= 8


@given(st.integers(0, 2**32 - 1))
def test_bits_are_read_lowest_first(value):
    bits = BitReader(value.to_bytes(4, "little"))
    assert [bits.read(1) for _ in range(32)] == [value >> i & 1 for i in range(32)]
    with pytest.raises(IndexError):
        bits.read(1)


def test_jpeg_xl_through_the_plugin():
    pytest.importorskip("pillow_jxl")
    for size in ((40, 24), (333, 77), (640, 480)):
        buffer = BytesIO()
        make_image(size).save(buffer, "JXL", lossless=True)
        assert parse_image_header(buffer.getvalue(), "x")[:2] == size
        assert decode_image(buffer.getvalue(), "x").tobytes() == make_image(size).tobytes()


@pytest.mark.parametrize("size", [(40, 24), (9, 300)])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_bitmaps(size, mode):
    buffer = BytesIO()
    make_image(size).convert(mode).save(buffer, "BMP")
    assert parse_image_header(buffer.getvalue(), "x")[:3] == (*size, 1)
    top_down = bytearray(buffer.getvalue())
    top_down[22:26] = (-size[1]).to_bytes(4, "little", signed=True)  # rows from the top
    assert Image.open(BytesIO(bytes(top_down))).size == size
    assert parse_image_header(bytes(top_down), "x")[:3] == (*size, 1)


def test_a_damaged_bitmap_is_named():
    buffer = BytesIO()
    make_image((40, 24)).save(buffer, "BMP")
    for data in (buffer.getvalue()[:20], b"BM" + bytes(60)):
        with pytest.raises(UserError, match=r"x\.bmp") as error:
            parse_image_header(data, "x.bmp")
        assert error.value.code == "image-header-damaged"


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    make_image((64, 32)).save(buffer, "AVIF", exif=exif)
    assert parse_image_header(buffer.getvalue(), "x")[:2] == ((32, 64) if orientation >= 5 else (64, 32))
    assert decode_image(buffer.getvalue(), "x").size == parse_image_header(buffer.getvalue(), "x")[:2]


PNG_START, WEBP_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"RIFF\0\0\0\0WEBPVP8X"
ENDLESS = {
    "jpeg padding": b"\xff\xd8\xff" + b"\xff" * 1_000_000,
    "jpeg segments": b"\xff\xd8" + b"\xff\xe1\0\2" * 250_000,
    "png chunks": PNG_START + b"\0\0\0\x40" * 2 + bytes(9) + b"\0\0\0\0tEXt\0\0\0\0" * 80_000,
    "webp chunks": WEBP_START + b"\x0a\0\0\0\x08\0\0\0\x3f\0\0\x3f\0\0" + b"abcd\0\0\0\0" * 120_000,
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDLESS)
def test_headers_of_a_million_pieces(kind):
    start = time.process_time()
    with pytest.raises(UserError) as error:
        parse_image_header(ENDLESS[kind], "a.png")
    assert error.value.code == "image-header-endless"
    assert time.process_time() - start < 1


def test_a_container_of_a_million_boxes_has_no_codestream():
    with pytest.raises(IndexError):
        parse(bytes.fromhex(BOXES) + b"\0\0\0\x08abcd" * 100_000)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_an_avif_with_one_changed_byte():
    data = encode("AVIF")
    for place in range(min(len(data), 300)):
        changed = data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]
        with contextlib.suppress(UserError):
            decode_image(changed, "a.avif")


def encode(kind: str) -> bytes:
    content = BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(content, kind)
    return content.getvalue()
