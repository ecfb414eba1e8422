"""Sizes from headers of formats beyond the usual ones, against what their decoders said of the same bytes."""

from __future__ import annotations

from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from data.conftest import picture
from sfumato.data.find.headers import header_of, of_bmp
from sfumato.data.find.headers_jxl import Bits, of_jxl
from sfumato.data.images import decode

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
# A photo of 40x24 pixels with orientation 6, taken over bit for bit: opened, it is the photo again, not turned.
BOXES = "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20"
STREAM = "000000136a786c7000000000ff0a0588056202"
PHOTO = BOXES + STREAM + "000000106a627264c070db008220082d"
# The same without what restores the photo: the decoder turns it.
TURNED = BOXES + STREAM + "00000010" + b"jxlp".hex() + "80000001e05b0210"


def header(data: bytes) -> tuple[int, int, int]:
    return of_jxl(data, lambda offset, count: data[offset : offset + count])


@pytest.mark.parametrize("start", JXL)
def test_sizes_of_jpeg_xl(start):
    assert header(bytes.fromhex(start) + bytes(64)) == JXL[start]


def test_only_a_photo_in_disguise_keeps_its_orientation():
    assert header(bytes.fromhex(PHOTO)) == (40, 24, 6)
    assert header(bytes.fromhex(TURNED)) == (24, 40, 1)


@given(st.binary(max_size=40), st.sampled_from([b"\xff\x0a", bytes.fromhex(BOXES)]))
def test_any_bytes_are_a_header_or_cut_short(data, start):
    try:
        width, height, orientation = header(start + data)
    except IndexError:
        return
    assert width >= 1
    assert height >= 1
    assert 1 <= orientation <= 8


@given(st.integers(0, 2**32 - 1))
def test_bits_come_lowest_first(value):
    bits = Bits(value.to_bytes(4, "little"))
    assert [bits.take(1) for _ in range(32)] == [value >> i & 1 for i in range(32)]
    with pytest.raises(IndexError):
        bits.take(1)


def test_jpeg_xl_through_the_plug_in():
    pytest.importorskip("pillow_jxl")
    for size in ((40, 24), (333, 77), (640, 480)):
        buffer = BytesIO()
        picture(size).save(buffer, "JXL", lossless=True)
        assert header_of(buffer.getvalue(), "x")[:2] == size
        assert decode(buffer.getvalue(), "x").tobytes() == picture(size).tobytes()


@pytest.mark.parametrize("size", [(40, 24), (9, 300)])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_bitmaps(size, mode):
    buffer = BytesIO()
    picture(size).convert(mode).save(buffer, "BMP")
    assert of_bmp(buffer.getvalue())[:2] == size
    upside = bytearray(buffer.getvalue())
    upside[22:26] = (-size[1]).to_bytes(4, "little", signed=True)  # rows from the top
    assert Image.open(BytesIO(bytes(upside))).size == size
    assert of_bmp(bytes(upside))[:2] == size


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    picture((64, 32)).save(buffer, "AVIF", exif=exif)
    assert header_of(buffer.getvalue(), "x")[:2] == ((32, 64) if orientation >= 5 else (64, 32))
    assert decode(buffer.getvalue(), "x").size == header_of(buffer.getvalue(), "x")[:2]
