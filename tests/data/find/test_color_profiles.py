"""Embedded color profiles against the closed form of their matrices and curves, and against Pillow's ImageCms."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.conftest import make_image
from data.profiles import make_cmyk_profile, make_gray_profile, make_matrix, make_profile, srgb_curve
from sfumato.data.find.color_profiles import classify_profile
from sfumato.data.images import Transform, decode_image, prepare_mask, prepare_with_alpha

SIZE = (40, 24)
ARGV = ("--resolution", 64, "--caption_extension", ".txt")
PLAIN = Transform(resized=SIZE, bucket=SIZE, interpolation="lanczos")


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def convert_by_formula(pixels: np.ndarray, name: str, gamma: float | None) -> np.ndarray:
    levels = pixels / 255
    linear = srgb_curve(levels) if gamma is None else levels**gamma
    matrix = np.linalg.inv(make_matrix("sRGB")) @ make_matrix(name)
    return encode_srgb(linear @ matrix.T) * 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("name", "gamma"), [("Adobe RGB", 2.19921875), ("Display P3", None), ("sRGB", 1.8)])
def test_pixels_are_those_of_the_formula(kind, name, gamma):
    image = make_image(SIZE)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = save(image, kind, icc_profile=make_profile(name, gamma=gamma), **options)
    pixels = np.asarray(decode_image(data, "x")).astype(float)
    assert np.abs(pixels - convert_by_formula(np.asarray(image), name, gamma)).max() <= 1.5
    assert np.abs(pixels - np.asarray(image)).max() > 8


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
@pytest.mark.parametrize("variant", ["by hand", "of ImageCms"])
def test_an_image_in_srgb_stays_bit_for_bit(mode, variant):
    profile = make_profile("sRGB")
    if variant == "of ImageCms":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = make_image(SIZE).convert(mode)
    with_profile, without = save(image, "PNG", icc_profile=profile), save(image, "PNG")
    assert classify_profile(Image.open(BytesIO(with_profile))) == "srgb"
    assert decode_image(with_profile, "x").tobytes() == decode_image(without, "x").tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "L"])
def test_other_modes_are_converted_as_their_rgb_is(mode):
    profile = make_profile("Adobe RGB", gamma=2.19921875)
    image = make_image(SIZE).convert(mode)
    pixels = np.asarray(decode_image(save(image, "PNG", icc_profile=profile), "x"))
    srgb = ImageCms.createProfile("sRGB")
    wanted = ImageCms.profileToProfile(image.convert("RGB"), BytesIO(profile), srgb)
    assert np.array_equal(pixels, np.asarray(wanted))


@pytest.mark.parametrize("deep", [False, True])
def test_gray_by_its_curve(deep):
    levels = np.linspace(0, 255, 40 * 24).reshape(24, 40).astype(np.uint8)
    image = Image.fromarray(levels.astype(np.uint16) * 257 if deep else levels)
    pixels = np.asarray(decode_image(save(image, "PNG", icc_profile=make_gray_profile(1.0)), "x"))
    wanted = encode_srgb(levels / 255) * 255
    assert np.abs(pixels.astype(float) - wanted[..., None]).max() <= 1.5


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_are_shown_in_the_colors_of_their_profile(kind):
    """Of a profile whose cyan is a gray of lightness 50 and whose black is black; without it, cyan is (0, 255, 255)."""
    profile = make_cmyk_profile({(1, 0, 0, 0): (50.0, 0.0, 0.0), (0, 0, 0, 1): (0.0, 0.0, 0.0)})
    bands = np.zeros((24, 48, 4), np.uint8)
    bands[:, 16:32, 0] = 255
    bands[:, 32:, 3] = 255
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = save(Image.fromarray(bands, "CMYK"), kind, icc_profile=profile, **options)
    pixels = np.asarray(decode_image(data, "x")).astype(int)
    middle = encode_srgb(np.array(((50 + 16) / 116) ** 3)) * 255
    for column, level in ((8, 255), (24, middle), (40, 0)):
        assert np.abs(pixels[4:20, column] - level).max() <= 3


def test_broken_profiles_and_those_of_other_images_change_nothing():
    image = make_image(SIZE)
    for profile in (b"no profile" * 30, make_profile("Display P3")[:200], make_gray_profile(1.0)):
        data = save(image, "PNG", icc_profile=profile)
        assert classify_profile(Image.open(BytesIO(data))) == "broken"
        assert decode_image(data, "x").tobytes() == image.tobytes()


def test_masks_and_alpha_are_numbers_and_not_colors():
    image = make_image(SIZE)
    image.putalpha(image.getchannel("R"))
    data = save(image, "PNG", icc_profile=make_profile("sRGB", gamma=1.0))
    red = np.asarray(image)[..., 0]
    assert np.array_equal(prepare_mask(data, PLAIN, size=SIZE, path="x"), red)
    pixels, alpha = prepare_with_alpha(data, PLAIN, size=SIZE, path="x")
    assert np.array_equal(alpha, red)
    assert not np.array_equal(pixels[..., 0], red)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_notes_name_the_images_of_each_kind(find, tmp_path, kind):
    folder = tmp_path / "t" / "1_a"
    folder.mkdir(parents=True)
    profiles = {"p3": make_profile("Display P3"), "srgb": make_profile("sRGB"), "broken": b"no profile" * 30}
    profiles["large"] = make_profile("Adobe RGB", gamma=2.2) + bytes(150_000)  # several segments of a JPEG
    for name, profile in profiles.items():
        make_image((64, 64)).save(folder / f"{name}.{kind.lower()}", kind, icc_profile=profile)
        (folder / f"{name}.txt").write_text("cat")
    notes = find("--train_data_dir", tmp_path / "t", *ARGV).notes
    ending = kind.lower()
    for words, names in (("converted to sRGB", f"large.{ending}, p3.{ending}"), ("is ignored", f"broken.{ending}")):
        (note,) = [note for note in notes if words in note]
        assert note.endswith(f": {names}")
        assert f"{names.count(ending)} of 4 images" in note
