"""Image options that contradict a cache, and options without an effect, reported before training."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import UserError

ARGV = ("--resolution", 64, "--caption_extension", ".txt")


def write_photo(path, size=(96, 64), kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path, kind)
    path.with_suffix(".txt").write_text("cat")


def test_every_augmentation_that_contradicts_the_cache_is_reported_at_once(find, tmp_path):
    write_photo(tmp_path / "a" / "0.png")
    write_photo(tmp_path / "b" / "0.png")
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\ncolor_aug = true\n"
    text += "random_crop = true\n[[datasets.subsets]]\nimage_dir = '{root}/b'\nrandom_crop = true\nflip_aug = true\n"
    argv = ("--caption_extension", ".txt")
    with pytest.raises(UserError):
        find.toml(text, *argv, "--cache_latents")
    assert find.codes == ["augmentation-with-latent-cache"] * 3
    expected = [("subsets[0]", "color_aug"), ("subsets[0]", "random_crop"), ("subsets[1]", "random_crop")]
    for message, words in zip(find.messages, expected, strict=True):
        assert all(word in message for word in words), message
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
def test_a_crop_around_faces_without_effect(find, tmp_path, argv, size, words):
    write_photo(tmp_path / "t" / "1_a" / "0.png", size)
    data = ("--train_data_dir", tmp_path / "t", *ARGV, "--face_crop_aug_range", "1,2")
    assert any(words in note for note in find(*data, *argv).notes)
    with pytest.raises(UserError, match="face_crop_aug_range") as error:
        find(*data, *argv, "--strict")
    assert error.value.code == "data-option-without-effect"


def test_a_crop_around_faces(find, tmp_path):
    write_photo(tmp_path / "t" / "1_a" / "me_40_30_20_20.png")
    assert find("--train_data_dir", tmp_path / "t", *ARGV, "--face_crop_aug_range", "1,2").notes == ()


@pytest.mark.parametrize(
    ("size", "buckets", "reported"),
    [
        ((64, 64), False, True),
        ((128, 128), False, False),  # a window of an image that is not resized
        ((128, 128), True, True),
        ((96, 64), True, False),
    ],
)
def test_a_random_crop_of_nothing(find, tmp_path, size, buckets, reported):
    write_photo(tmp_path / "t" / "1_a" / "0.png", size)
    argv = ("--enable_bucket", "--min_bucket_reso", 64) if buckets else ()
    notes = find("--train_data_dir", tmp_path / "t", *ARGV, "--random_crop", *argv).notes
    assert any("random_crop has no effect" in note for note in notes) == reported


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_without_an_alpha_channel(find, tmp_path, kind):
    write_photo(tmp_path / "t" / "1_a" / f"0.{kind.lower()}", kind=kind)
    notes = find("--train_data_dir", tmp_path / "t", *ARGV, "--alpha_mask").notes
    assert any("alpha_mask has no effect" in note for note in notes)
