"""What image options cannot be had with a cache, and which change nothing: told before training."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import UserError

ARGV = ("--resolution", 64, "--caption_extension", ".txt")


def photo(path, size=(96, 64), kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path, kind)
    path.with_suffix(".txt").write_text("cat")


def test_everything_a_cache_cannot_follow_is_told_at_once(find, tmp_path):
    photo(tmp_path / "a" / "0.png")
    photo(tmp_path / "b" / "0.png")
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\ncolor_aug = true\n"
    text += "random_crop = true\n[[datasets.subsets]]\nimage_dir = '{root}/b'\nrandom_crop = true\nflip_aug = true\n"
    argv = ("--caption_extension", ".txt")
    with pytest.raises(UserError):
        find.toml(text, *argv, "--cache_latents")
    told = [line.split(": ", 1)[1] for line in find.said]
    why = "changes the picture at every step, and cache_latents encodes it once"
    assert told == [
        f"datasets[0].subsets[0]: color_aug {why} — leave out color_aug or the cache",
        f"datasets[0].subsets[0]: random_crop {why} — leave out random_crop or the cache",
        f"datasets[0].subsets[1]: random_crop {why} — leave out random_crop or the cache",
    ]
    assert find.toml(text, *argv).notes == ()
    turned_off = text.replace("color_aug = true", "color_aug = false").replace("random_crop = true", "")
    assert find.toml(turned_off, *argv, "--cache_latents").num_train_images == 2


@pytest.mark.parametrize(
    ("argv", "size", "words"),
    [
        ((), (96, 64), "no file name ends in a face"),
        (("--enable_bucket", "--min_bucket_reso", 64), (96, 64), "no effect with enable_bucket"),
        (("--cache_latents",), (96, 64), "no effect with cache_latents"),
    ],
)
def test_a_crop_around_faces_that_cannot_be(find, tmp_path, argv, size, words):
    photo(tmp_path / "t" / "1_a" / "0.png", size)
    data = ("--train_data_dir", tmp_path / "t", *ARGV, "--face_crop_aug_range", "1,2")
    assert any(words in note for note in find(*data, *argv).notes)
    with pytest.raises(UserError, match=words):
        find(*data, *argv, "--strict")


def test_a_crop_around_faces_that_can(find, tmp_path):
    photo(tmp_path / "t" / "1_a" / "me_40_30_20_20.png")
    assert find("--train_data_dir", tmp_path / "t", *ARGV, "--face_crop_aug_range", "1,2").notes == ()


@pytest.mark.parametrize(
    ("size", "buckets", "told"),
    [
        ((64, 64), False, True),
        ((128, 128), False, False),  # a window at the picture's own size
        ((128, 128), True, True),
        ((96, 64), True, False),
    ],
)
def test_a_random_crop_of_nothing(find, tmp_path, size, buckets, told):
    photo(tmp_path / "t" / "1_a" / "0.png", size)
    argv = ("--enable_bucket", "--min_bucket_reso", 64) if buckets else ()
    notes = find("--train_data_dir", tmp_path / "t", *ARGV, "--random_crop", *argv).notes
    assert any("random_crop has no effect: nothing of any picture" in note for note in notes) == told


@pytest.mark.parametrize(("kind", "told"), [("JPEG", True), ("PNG", False)])
def test_formats_without_an_alpha_channel(find, tmp_path, kind, told):
    photo(tmp_path / "t" / "1_a" / f"0.{kind.lower()}", kind=kind)
    notes = find("--train_data_dir", tmp_path / "t", *ARGV, "--alpha_mask").notes
    assert any("alpha_mask has no effect" in note for note in notes) == told
