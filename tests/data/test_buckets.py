"""Buckets against recorded choices of sd-scripts, and their properties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.data.buckets import Buckets, crop_box, crop_offset, list_bucket_sizes

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "buckets.json").read_text(encoding="utf-8"))
TOO_SMALL = [63, 70]  # its recorded bucket has a side of 0, which nothing can be trained at


def buckets_of(config) -> Buckets:
    return Buckets(
        resolution=tuple(config["max_reso"]),
        shortest=config["min_bucket_reso"],
        longest=config["max_bucket_reso"],
        step=config["bucket_reso_steps"],
        no_upscale=config["no_upscale"],
    )


@pytest.mark.parametrize("golden", GOLDENS["configs"], ids=lambda golden: str(golden["config"].values()))
def test_sizes_and_choices_are_the_recorded_ones(golden):
    buckets = buckets_of(golden["config"])
    if not buckets.no_upscale:
        assert [list(size) for size in buckets.sizes] == golden["predefined_resolutions"]
    for row in golden["images"]:
        image = tuple(row["image"])
        choice = buckets.choose(image)
        if 0 in row["bucket"]:
            assert row["image"] == TOO_SMALL
            assert (choice.bucket, choice.resized) == ((64, 64), (64, 71))  # one step, just covered
            continue
        assert list(choice.bucket) == row["bucket"], row
        assert list(choice.resized) == row["resized"], row
        assert list(crop_box(image, choice.bucket)) == row["crop_ltrb_returned"], row
        assert list(crop_offset(choice.resized, choice.bucket)) == row["pixel_crop_left_top"], row


def test_without_buckets_there_is_one_size():
    buckets = Buckets(resolution=(512, 768), enabled=False)
    for row in GOLDENS["no_bucket_mode_512x768"]:
        choice = buckets.choose(tuple(row["image"]))
        assert [list(choice.bucket), list(choice.resized)] == [row["bucket"], row["resized"]]


SIDES = st.integers(8, 20_000)


@given(SIDES, SIDES, st.sampled_from([8, 16, 32, 64]), st.integers(256, 1024), st.booleans(), st.booleans())
def test_every_choice_covers_its_bucket(width, height, step, side, no_upscale, enabled):
    buckets = Buckets(
        resolution=(side, side), shortest=256, longest=1024, step=step, no_upscale=no_upscale, enabled=enabled
    )
    choice = buckets.choose((width, height))
    assert choice.resized[0] >= choice.bucket[0]
    assert choice.resized[1] >= choice.bucket[1]
    if enabled:
        assert all(edge % step == 0 and edge > 0 for edge in choice.bucket)
        area = max(side * side, (side // step * step) ** 2)
        # rounding the free side to a pixel may add less than one row or column
        assert choice.bucket[0] * choice.bucket[1] <= area + max(choice.bucket)
    if no_upscale and enabled and min(width, height) >= step:
        assert choice.resized[0] <= width
        assert choice.resized[1] <= height
    assert buckets.choose((width, height)) is choice


@given(SIDES, SIDES)
def test_the_chosen_shape_is_the_nearest(width, height):
    buckets = Buckets(resolution=(512, 512))
    chosen = buckets.choose((width, height)).bucket
    error = abs(chosen[0] / chosen[1] - width / height)
    assert error <= min(abs(w / h - width / height) for w, h in buckets.sizes) or (width, height) == chosen


STEPS = st.sampled_from([8, 16, 32, 64])


@given(st.integers(64, 1200), st.integers(64, 1200), STEPS, st.integers(1, 8), st.integers(8, 40))
def test_the_list_holds_every_width_with_its_tallest_height_and_nothing_else(width, height, step, low, high):
    area, shortest, longest = width * height, low * step, high * step
    wanted = set()
    for side in range(shortest, longest + 1, step):
        fitting = [other for other in range(step, longest + 1, step) if side * other <= area]
        if fitting and max(fitting) >= shortest:
            wanted |= {(side, max(fitting)), (max(fitting), side)}
    square = max(side for side in range(0, area + 1, step) if side * side <= area)
    assert list_bucket_sizes(area, shortest=shortest, longest=longest, step=step) == sorted(wanted | {(square, square)})


@given(SIDES, SIDES, STEPS, st.integers(256, 1024), st.booleans())
def test_a_picture_keeps_its_shape_to_a_pixel_and_is_cut_on_one_side_only(width, height, step, side, no_upscale):
    buckets = Buckets(resolution=(side, side), shortest=256, longest=1024, step=step, no_upscale=no_upscale)
    choice = buckets.choose((width, height))
    if min(width, height) >= step:
        drift = abs(choice.resized[0] / width - choice.resized[1] / height)
        assert drift <= 0.5 / min(width, height) * 1.001  # half a pixel on the shorter side at most
    surplus = [resized - edge for resized, edge in zip(choice.resized, choice.bucket, strict=True)]
    if no_upscale:
        assert all(side < step for side in surplus) or min(width, height) < step
    else:
        assert min(surplus) == 0


@given(SIDES, SIDES)
def test_sizes_of_one_picture_at_several_resolutions_do_not_depend_on_each_other(width, height):
    one, other = Buckets(resolution=(512, 512)), Buckets(resolution=(1024, 1024), longest=2048)
    alone = Buckets(resolution=(1024, 1024), longest=2048).choose((width, height))
    assert one.choose((width, height)).bucket in one.sizes
    assert other.choose((width, height)) == alone
    assert one.choose((width, height)) is one.choose((width, height))
