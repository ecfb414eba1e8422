"""Headers and pixels against Pillow and closed forms; damaged files."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from sfumato.data.buckets import resize_to_cover
from sfumato.data.find.folders import read_images
from sfumato.data.find.headers import parse_image_header
from sfumato.data.find.index import Index
from sfumato.data.images import (
    RESAMPLING_FILTERS,
    ColorChange,
    Transform,
    choose_interpolation,
    decode_image,
    hash_content,
    prepare_pixels,
    prepare_with_alpha,
    resize_and_crop,
    resize_window,
)
from sfumato.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


def noise(width=40, height=24, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(size, **options) -> Transform:
    return Transform(resized=size, bucket=size, interpolation="lanczos", **options)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(40, 24), (9, 300), (1000, 8)])
def test_headers_of_every_format(kind, size):
    data = saved(noise(*size), kind)
    assert parse_image_header(data, "x")[:2] == size


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 50}, {"exif": Image.Exif()}])
def test_the_three_kinds_of_webp(options):
    assert parse_image_header(saved(noise(333, 77), "WEBP", **options), "x")[:2] == (333, 77)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_sizes_and_pixels_alike(kind, orientation):
    exif = Image.Exif()
    exif[0x010E] = "a long description before the orientation " * 5
    exif[0x0112] = orientation
    data = saved(noise(), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    ours = decode_image(data, "x")
    assert parse_image_header(data, "x")[:2] == ours.size == upright.size
    assert np.array_equal(np.asarray(ours), np.asarray(upright))


def test_long_segments_before_the_size_are_walked_over():
    data = saved(noise(), "JPEG", icc_profile=b"p" * 150_000, comment=b"c" * 60_000)
    assert parse_image_header(data, "x")[:2] == (40, 24)


def test_sixteen_bit_grey_is_scaled():
    grey = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    data = saved(Image.fromarray(grey), "PNG")
    pixels = np.asarray(decode_image(data, "x")).astype(int)
    assert np.abs(pixels - (grey / 257)[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_become_the_rgb_that_pillow_makes(mode):
    image = noise().convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    data = saved(image, kind)
    wanted = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(decode_image(data, "x")), wanted)


def test_alpha_is_dropped_not_blended():
    rgba = np.dstack([np.asarray(noise()), np.zeros((24, 40), np.uint8)])
    assert np.array_equal(np.asarray(decode_image(saved(Image.fromarray(rgba), "PNG"), "x")), rgba[..., :3])


def test_a_palette_with_transparency_keeps_its_colours():
    image = noise().quantize(16)
    data = saved(image, "PNG", transparency=bytes(range(16)))
    assert np.array_equal(np.asarray(decode_image(data, "x")), np.asarray(image.convert("RGB")))


def with_transparency(kind: str) -> tuple[bytes, np.ndarray]:
    """A file and its alpha channel as Pillow makes it of the colors."""
    image = noise()
    levels = np.random.default_rng(1).integers(0, 256, (24, 40), dtype=np.uint8)
    if kind in ("RGBA", "LA"):
        image = image.convert("RGB" if kind == "RGBA" else "L")
        image.putalpha(Image.fromarray(levels))
        data = saved(image, "PNG")
    elif kind == "palette":
        image = image.quantize(16)
        data = saved(image, "PNG", transparency=bytes(range(0, 160, 10)))
    elif kind == "color key":
        data = saved(image, "PNG", transparency=image.getpixel((3, 4)))
    elif kind == "webp":
        image.putalpha(Image.fromarray(levels))
        data = saved(image, "WEBP", lossless=True, exact=True)
    else:
        data = saved(image.quantize(8), "GIF", transparency=2)
    return data, np.asarray(Image.open(BytesIO(data)).convert("RGBA"))[..., 3]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "color key", "webp", "gif"])
def test_alpha_is_what_pillow_makes_of_it_and_changes_no_colour(kind):
    data, wanted = with_transparency(kind)
    assert wanted.min() < 255
    pixels, alpha = prepare_with_alpha(data, plain((40, 24)), size=(40, 24), path="x")
    assert np.array_equal(alpha, wanted)
    assert np.array_equal(pixels, np.asarray(decode_image(data, "x")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1"])
def test_an_image_without_alpha_counts_fully(mode):
    data = saved(noise().convert(mode), "TIFF")
    assert (prepare_with_alpha(data, plain((40, 24)), size=(40, 24), path="x")[1] == 255).all()


def test_the_transparent_level_of_sixteen_bit_grey():
    grey = np.arange(24 * 40).reshape(24, 40).astype(np.uint16) * 60
    image = Image.fromarray(grey)
    data = saved(image, "PNG", transparency=1200)
    _, alpha = prepare_with_alpha(data, plain((40, 24)), size=(40, 24), path="x")
    assert np.array_equal(alpha, np.where(grey == 1200, 0, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_alpha_is_turned_with_its_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise()
    image.putalpha(image.getchannel("R"))
    data = saved(image, "PNG", exif=exif)
    size = parse_image_header(data, "x")[:2]
    pixels, alpha = prepare_with_alpha(data, plain(size), size=size, path="x")
    assert np.array_equal(alpha, pixels[..., 0])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(kind):
    frames = [noise(seed=seed) for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 3
    wanted = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(decode_image(data, "x")), wanted)
    assert kind == "GIF" or np.array_equal(wanted, np.asarray(frames[0]))


def test_a_cmyk_jpeg_as_photo_programs_write_it():
    """Adobe's are inverted, and say so; the colors are those of the RGB they were made of."""
    image = noise().resize((400, 240), Image.Resampling.BICUBIC)
    data = saved(image.convert("CMYK"), "JPEG", quality=95)
    assert np.abs(np.asarray(decode_image(data, "x")).astype(int) - np.asarray(image)).mean() < 4


def test_sixteen_bits_of_colour():
    """A PNG of 16 bits a channel, written by hand: the high bytes are the image."""
    levels = np.random.default_rng(0).integers(0, 65536, (24, 40, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(np.asarray(decode_image(data, "x")).astype(int) - levels / 257).max() <= 1


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif():
    image = noise().resize((200, 120), Image.Resampling.BICUBIC)
    data = saved(image, "AVIF", quality=95)
    assert parse_image_header(data, "x")[:2] == (200, 120)
    assert np.abs(np.asarray(decode_image(data, "x")).astype(int) - np.asarray(image)).mean() < 6


def test_shrinking_to_half_takes_the_mean_of_four():
    image = noise(64, 32)
    transform = Transform(resized=(32, 16), bucket=(32, 16), interpolation="area")
    pixels = prepare_pixels(saved(image, "PNG"), transform, size=(64, 32), path="x").astype(int)
    mean = np.asarray(image).reshape(16, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(pixels - mean).max() <= 1  # Pillow rounds once a pass


def test_the_crop_is_central_and_the_mirror_last():
    image = noise(50, 33)
    transform = Transform(resized=(50, 33), bucket=(40, 24), interpolation="area")
    data = saved(image, "PNG")
    center = np.asarray(image)[4:28, 5:45]
    assert np.array_equal(prepare_pixels(data, transform, size=(50, 33), path="x"), center)
    flipped = Transform(resized=(50, 33), bucket=(40, 24), interpolation="area", flip=True)
    assert np.array_equal(prepare_pixels(data, flipped, size=(50, 33), path="x"), center[:, ::-1])


@settings(max_examples=60)
@given(
    st.integers(30, 400),
    st.integers(8, 80),
    st.sampled_from(sorted(set(RESAMPLING_FILTERS) - {"nearest"})),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_only_what_is_shown_of_a_very_long_picture_is_resized(width, height, interpolation, seed, upright):
    """The pixels are those of the complete image, resized and then cropped, except for rounding.

    "nearest" has ties, which rounding decides. Pillow goes across or down first, as is less work, and clips in between:
    the pixels here leave room for what overshoots.
    """
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(90, 166, (height, width, 3), dtype=np.uint8))
    image = image.transpose(Image.Transpose.ROTATE_90) if upright else image
    bucket = (32, 32)
    resized = resize_to_cover(image.size, bucket)
    offset = tuple(int(rng.integers(0, long - short + 1)) for long, short in zip(resized, bucket, strict=True))
    transform = Transform(resized=resized, bucket=bucket, interpolation=interpolation, offset=offset)
    left, top = offset
    complete = np.asarray(image.resize(resized, RESAMPLING_FILTERS[interpolation]))[top : top + 32, left : left + 32]
    window, (x, y) = resize_window(image, transform)
    part = np.asarray(window)[y : y + 32, x : x + 32]
    assert np.abs(part.astype(int) - complete).max() <= 2
    assert max(window.size) <= 34 + 2 * 4 * max(1, resized[0] / image.size[0])
    assert np.array_equal(
        resize_and_crop(image, transform), part if resized[0] * resized[1] > 8 * 32 * 32 else complete
    )


def test_a_strip_of_30000_pixels_takes_little_memory():
    """One that covers 1024x1024 only when it is enlarged to three million pixels a side."""
    strip = BytesIO()
    Image.fromarray(np.tile(np.arange(8, dtype=np.uint8)[:, None] * 30, (1, 30_000))).save(strip, "PNG")
    size = (30_000, 8)
    transform = Transform(resized=resize_to_cover(size, (1024, 1024)), bucket=(1024, 1024), interpolation="lanczos")
    assert transform.resized == (3_840_000, 1024)
    pixels = prepare_pixels(strip.getvalue(), transform, size=size, path="strip.png")
    assert pixels.shape == (1024, 1024, 3)
    assert (pixels == pixels[:, :1]).all()


def test_interpolation_is_chosen_by_direction_unless_given():
    assert choose_interpolation((100, 100), (50, 50), None) == "area"
    assert choose_interpolation((100, 100), (100, 100), None) == "area"
    assert choose_interpolation((100, 40), (100, 50), None) == "lanczos"
    assert choose_interpolation((100, 100), (50, 50), "nearest") == "nearest"
    assert choose_interpolation((100, 100), (50, 50), "area") == "area"
    assert choose_interpolation((100, 100), (50, 200), "area") == "bilinear"  # nothing to average where a side grows


def test_transforms_that_give_the_same_pixels_have_one_name():
    def name(interpolation: str) -> str:
        return Transform(resized=(8, 8), bucket=(8, 8), interpolation=interpolation).cache_name((9, 9))

    assert name("linear") == name("bilinear")
    assert len({name(each) for each in ("linear", "cubic", "area", "nearest", "lanczos")}) == 5
    assert plain((8, 8)).cache_name((9, 9)) != plain((8, 8), flip=True).cache_name((9, 9))


def test_every_difference_has_a_name():
    one, size = Transform(resized=(20, 10), bucket=(8, 8), interpolation="area"), (40, 20)
    others = [
        replace(one, **change)
        for change in (
            {"resized": (20, 9)}, {"bucket": (8, 9)}, {"interpolation": "cubic"}, {"offset": (5, 1)}, {"flip": True},
            {"color": ColorChange(hue=0.01)}, {"color": ColorChange(gamma=1.01)}, {"color": ColorChange(gamma=1.02)},
        )
    ]  # fmt: skip
    assert len({each.cache_name(size) for each in (one, *others)}) == 9
    assert replace(one, offset=(6, 1)).cache_name(size) == one.cache_name(size)  # the center, given or by default
    assert all(each.geometry.cache_name(size) == one.cache_name(size) for each in others[-3:])
    unresized = {replace(one, interpolation=each).cache_name((20, 10)) for each in RESAMPLING_FILTERS}
    assert unresized == {one.cache_name(size)}  # a filter does nothing where nothing is resized


def test_an_image_that_changed_its_size_is_an_error():
    with pytest.raises(UserError) as error:
        prepare_pixels(saved(noise(), "PNG"), plain((40, 24)), size=(41, 24), path="cat.png")
    assert error.value.code == "image-size-changed"
    assert all(value in str(error.value) for value in ("cat.png", "40x24", "41x24"))


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60000x60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    "empty.png": (b"", "is empty (0 bytes)"),
    "text.jpg": (b"this is no image", "is no image, or is damaged"),
    "page.png": (b"<!DOCTYPE html><html>", "is a web page"),
    "drawing.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n", "is a PostScript file"),
    "cut.jpg": (saved(noise(), "JPEG")[:30], "is no image, or is damaged"),
    "dot.png": (saved(noise(1, 1), "PNG"), "is only 1x1 pixels"),
    "bomb.png": (bomb(), "claims 60000x60000 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers_name_the_file(tmp_path, name):
    data, words = BAD[name]
    (tmp_path / name).write_bytes(data)
    found = read_images(str(tmp_path), [name, "gone.png"], Index(tmp_path / "cache", ("images", str(tmp_path))))
    assert not len(found.valid_rows)
    assert str(tmp_path / name) in found.faults[0].what
    assert words in found.faults[0].what
    assert "gone.png cannot be read" in found.faults[1].what


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
def test_pixels_that_are_cut_short_name_the_file(kind, part):
    data = saved(noise(200, 200), kind)
    with pytest.raises(UserError, match=r"cut\.png is (damaged|no image)"):
        prepare_pixels(data[: int(len(data) * part)], plain((200, 200)), size=(200, 200), path="cut.png")


WHOLE = [saved(noise(), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP")]


@given(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=8))
def test_any_damage_is_a_header_or_a_clear_error(data, changes):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        width, height, orientation, _ = parse_image_header(bytes(damaged), "x")
        decode_image(bytes(damaged), "x")
    except UserError:
        pass  # any other kind of error fails the test
    else:
        assert width >= 8
        assert height >= 8
        assert 1 <= orientation <= 8


def test_content_is_what_counts():
    assert hash_content(b"a") == hash_content(b"a") != hash_content(b"b")
