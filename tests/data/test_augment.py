"""Augmentation: pure functions of a sample's generators; windows lie inside, masks and control images stay aligned."""

from __future__ import annotations

import colorsys
from collections import Counter
from io import BytesIO
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from sfumato.common.seeds import python_random
from sfumato.data.augment import (
    ImageRules,
    center_transform,
    compute_size_conditioning,
    draw_color_change,
    draw_transform,
    parse_face,
)
from sfumato.data.buckets import Buckets, crop_box
from sfumato.data.images import (
    RESAMPLING_FILTERS,
    ColorChange,
    change_color,
    prepare_mask,
    prepare_pixels,
    prepare_with_alpha,
)


def generators(seed: int):
    return lambda purpose: python_random(seed, purpose)


def saved(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def coordinates(width: int, height: int) -> np.ndarray:
    """Red is x, green is y, alpha is x again: every pixel says where it is."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., 0] = pixels[..., 3] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return pixels


SIDES = st.integers(16, 256)
SMOOTH = st.sampled_from([None, *(name for name in RESAMPLING_FILTERS if name not in ("nearest", "box"))])
RULES = st.builds(
    ImageRules,
    flip_aug=st.booleans(),
    random_crop=st.booleans(),
    face_crop_aug_range=st.sampled_from([None, (1.0, 3.0), (2.0, 2.0), (0.0, 4.0)]),
    resize_interpolation=SMOOTH,
)
BUCKETS = st.sampled_from(
    [
        Buckets(resolution=(64, 64), shortest=32, longest=128, step=16),
        Buckets(resolution=(64, 64), step=8, no_upscale=True),
        Buckets(resolution=(48, 80), enabled=False),
    ]
)
FACES = st.sampled_from(["x.png", "x_100_80_40_60.png", "a_b_8_8_200_190.png", "x_5000_1_3_3.png"])


def draw(rules, buckets, size, path, seed):
    rules = ImageRules(**{**vars(rules), "full_size": not buckets.enabled})
    choice = buckets.choose(size)
    return draw_transform(rules, size, choice, path, generators(seed)), choice


@given(RULES, BUCKETS, SIDES, SIDES, FACES, st.integers(0, 10**6))
def test_windows_are_inside_and_are_functions_of_the_seed(rules, buckets, width, height, path, seed):
    transform, choice = draw(rules, buckets, (width, height), path, seed)
    assert transform == draw(rules, buckets, (width, height), path, seed)[0]
    assert transform.bucket == choice.bucket
    for corner, window, side in zip(transform.corner, transform.bucket, transform.resized, strict=True):
        assert 0 <= corner <= corner + window <= side
    if min(width, height) >= 64:  # whatever is enlarged, covers its bucket only just
        larger = [a > b for a, b in zip(transform.resized, (width, height), strict=True)]
        covers = [a <= b + 1 for a, b in zip(transform.resized, transform.bucket, strict=True)]
        assert not any(larger) or any(covers)


@given(RULES, BUCKETS, SIDES, SIDES, FACES, st.integers(0, 10**6))
def test_every_pixel_comes_from_where_the_transform_says_and_masks_with_it(rules, buckets, width, height, path, seed):
    transform, _ = draw(rules, buckets, (width, height), path, seed)
    scales = [side / long for side, long in zip((width, height), transform.resized, strict=True)]
    assume(max(scales) <= 8)
    data = saved(coordinates(width, height))
    pixels, alpha = prepare_with_alpha(data, transform, size=(width, height), path="x")
    for axis in (0, 1):
        places = np.arange(transform.bucket[axis])
        if axis == 0 and transform.flip:
            places = places[::-1]
        wanted = (transform.corner[axis] + places + 0.5) * scales[axis] - 0.5
        inside = (wanted > 3 * scales[axis] + 3) & (wanted < (width, height)[axis] - 3 * scales[axis] - 4)
        coordinate = pixels[..., axis].astype(float)
        coordinate = coordinate if axis == 0 else coordinate.T
        assert np.abs(coordinate - wanted)[:, inside].max(initial=0) <= 1.01
    assert np.array_equal(alpha, pixels[..., 0])
    assert np.array_equal(prepare_mask(data, transform, size=(width, height), path="x"), pixels[..., 0])
    assert np.array_equal(prepare_pixels(data, transform.geometry, size=(width, height), path="x"), pixels)


@given(RULES, BUCKETS, st.integers(64, 127), st.integers(64, 127), FACES, st.integers(0, 10**6))
def test_a_mask_of_half_the_size_falls_on_the_same_pixels(rules, buckets, width, height, path, seed):
    size = (2 * width, 2 * height)
    transform, _ = draw(rules, buckets, size, path, seed)
    image = coordinates(*size)
    small = image.reshape(height, 2, width, 2, 4).mean((1, 3)).round().astype(np.uint8)
    pixels = prepare_pixels(saved(image), transform, size=size, path="x")
    mask = prepare_mask(saved(small), transform, size=(width, height), path="x")
    inner = slice(8, -8)
    assert np.abs(mask.astype(int) - pixels[..., 0])[inner, inner].max() <= 3


def test_a_random_crop_reaches_every_place_alike():
    buckets = Buckets(resolution=(64, 64), shortest=64, longest=64)
    choice = buckets.choose((70, 64))
    rules = ImageRules(random_crop=True)
    lefts = Counter(draw_transform(rules, (70, 64), choice, "x", generators(seed)).corner[0] for seed in range(700))
    assert set(lefts) == set(range(7))
    assert min(lefts.values()) > 60  # of 100 expected; 4 deviations below


def test_without_buckets_a_random_crop_is_a_window_at_the_pictures_own_size():
    buckets = Buckets(resolution=(64, 64), enabled=False)
    rules = ImageRules(random_crop=True, full_size=True)
    large = draw_transform(rules, (200, 100), buckets.choose((200, 100)), "x", generators(1))
    assert large.resized == (200, 100)
    assert compute_size_conditioning((200, 100), large, full_size=True) == ((64, 64), (0, 0))
    small = draw_transform(rules, (200, 50), buckets.choose((200, 50)), "x", generators(1))
    assert small.resized == (256, 64)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(100, 64), (64, 100), (90, 90)])
def test_size_conditioning_does_not_follow_a_random_crop_and_is_mirrored_with_the_picture(flip, size):
    """Like in sd-scripts: the numbers of the image fitted into its bucket."""
    buckets = Buckets(resolution=(64, 64), shortest=64, longest=128)
    choice = buckets.choose(size)
    left, top, right, _ = crop_box(size, choice.bucket)
    wanted = int(choice.bucket[0] - right if flip else left)
    plain = center_transform(ImageRules(), size, choice, flip=flip)
    random = draw_transform(ImageRules(random_crop=True), size, choice, "x", generators(3))
    assert compute_size_conditioning(size, plain, full_size=False) == (size[::-1], (int(top), wanted))
    assert compute_size_conditioning(size, random, full_size=False) == (size[::-1], (int(top), int(left)))


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("folder_1_2_3_4/x.png", None),
        ("1_2_3_4.png", None),
        ("me_10_20_30_40.png", (10, 20, 30, 40)),
        ("me_too_10_20_30_40.webp", (10, 20, 30, 40)),
        ("me_10_20_0_0.png", None),
        ("me_-1_20_30_40.png", None),
    ],
)
def test_faces_are_read_from_names(name, face):
    assert parse_face(name) == face


FACE = "x_500_400_100_80.png"


def around(near: float, far: float, seed: int, **options) -> tuple[float, tuple[int, int], tuple[int, int]]:
    """Zoom, middle of the window and middle of the face in a 1000x800 image, cropped to 256x192."""
    rules = ImageRules(face_crop_aug_range=(near, far), full_size=True, **options)
    choice = Buckets(resolution=(256, 192), enabled=False).choose((1000, 800))
    found = draw_transform(rules, (1000, 800), choice, FACE, generators(seed))
    scale = found.resized[0] / 1000
    middle = (found.corner[0] + 128, found.corner[1] + 96)
    return scale, middle, (round(500 * scale), round(400 * scale))


def test_faces_are_zoomed_to_the_range_and_stay_in_the_middle():
    """The shorter side of 192 pixels is 2 to 4 faces of 100 pixels."""
    found = [around(2.0, 4.0, seed) for seed in range(300)]
    scales = [scale for scale, _, _ in found]
    assert 192 / 400 <= min(scales) < 0.5 < 0.94 < max(scales) <= 192 / 200 + 1e-3
    for _, window, face in found:
        assert all(abs(a - b) <= 100 // 20 + 1 for a, b in zip(window, face, strict=True))
    assert len({(window[0] - face[0]) for _, window, face in found}) > 5  # shifted by a twentieth of the face
    still = [around(2.0, 2.0, seed) for seed in range(20)]
    for _, window, face in still:
        assert all(abs(a - b) <= 1 for a, b in zip(window, face, strict=True))


def test_with_random_crop_faces_move_far_and_most_often_a_little():
    found = [around(2.0, 2.0, seed, random_crop=True) for seed in range(400)]
    shifts = np.array([window[0] - face[0] for _, window, face in found])
    assert abs(shifts.mean()) < 40
    assert shifts.min() < -250
    assert shifts.max() > 250
    inner, outer = np.sum(np.abs(shifts) < 120), np.sum((np.abs(shifts) >= 120) & (np.abs(shifts) < 240))
    assert inner > outer


def test_a_face_never_enlarges_beyond_covering():
    rules = ImageRules(face_crop_aug_range=(0.1, 0.2), full_size=True)
    choice = Buckets(resolution=(64, 64), enabled=False).choose((100, 32))
    assert draw_transform(rules, (100, 32), choice, "x_50_16_10_10.png", generators(0)).resized == (200, 64)
    assert draw_transform(rules, (300, 300), choice, "x_50_16_10_10.png", generators(0)).resized == (300, 300)


def test_colours_change_in_a_third_of_all_cases_half_hue_half_gamma():
    found = [draw_color_change(Random(seed)) for seed in range(6000)]
    hues = [color.hue for color in found if color is not None and color.gamma == 1.0]
    gammas = [color.gamma for color in found if color is not None and color.gamma != 1.0]
    assert all(abs(len(values) / 6000 - 0.165) < 0.02 for values in (hues, gammas))
    assert -8 / 180 <= min(hues) < -7.8 / 180 < 7.8 / 180 < max(hues) <= 8 / 180
    assert 0.95 <= min(gammas) < 0.952 < 1.048 < max(gammas) <= 1.05


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), st.floats(-8 / 180, 8 / 180))
def test_a_hue_is_turned_as_colorsys_turns_it(red, green, blue, turn):
    """Within the 256 steps in which Pillow keeps hue, saturation and value."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    wanted = np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)) * 255
    pixel = np.array([[[red, green, blue]]], np.uint8)
    assert np.abs(change_color(pixel, ColorChange(hue=turn))[0, 0] - wanted).max() <= 8


@given(st.floats(0.95, 1.05))
def test_a_gamma_is_a_power(gamma):
    levels = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
    wanted = 255 * (levels / 255.0) ** gamma
    assert np.abs(change_color(levels, ColorChange(gamma=gamma)) - wanted).max() <= 0.5 + 1e-9


def test_what_varies_is_what_a_cache_cannot_follow():
    rules = ImageRules(color_aug=True, random_crop=True, flip_aug=True, face_crop_aug_range=(1, 2), full_size=True)
    assert rules.varying_options == ("color_aug", "random_crop", "face_crop_aug_range")
    assert rules.uncacheable_options == ()
    assert ImageRules(**{**vars(rules), "cached": True}).uncacheable_options == ("color_aug", "random_crop")
    assert ImageRules(flip_aug=True, cached=True).uncacheable_options == ()
