"""From images to the plan of a dataset: regularization images, size limit, batches and steps."""

from __future__ import annotations

import pytest

from data.conftest import write_images
from data.dataset_files import (
    RESOLUTION,
    SUBSET,
    list_items,
)
from sfumato.data.find.data_rows import make_data_rows
from sfumato.errors import UserError


@pytest.mark.parametrize(
    ("own", "count", "train", "expected"),
    [
        (1, 4, 10, [3, 3, 2, 2]),  # once each, then again from the start
        (2, 4, 10, [3, 3, 2, 2]),
        (3, 4, 10, [3, 3, 3, 3]),  # the first pass adds whole repeats: it may pass the number
        (1, 4, 3, [1, 1, 1, 0]),  # more than needed
        (5, 2, 3, [5, 0]),
    ],
)
def test_regularization_images_are_balanced(find, tmp_path, own, count, train, expected):
    write_images(tmp_path / "t" / f"{train}_cat", 1)
    write_images(tmp_path / "r" / f"{own}_cat", count)
    plan = find("--train_data_dir", tmp_path / "t", "--reg_data_dir", tmp_path / "r", *RESOLUTION)
    _, regularization = plan.datasets[0].subsets
    assert list(regularization.repeats) == expected
    assert plan.num_reg_images == own * count
    assert plan.samples_per_epoch == train + sum(expected)
    assert any("more than needed" in note for note in plan.notes) == (0 in expected)


def test_several_regularization_subsets_keep_their_own_settings(find, tmp_path):
    for name in "abc":
        write_images(tmp_path / name, 2)
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\nnum_repeats = 5\n"
    text += f"{SUBSET}b'\nis_reg = true\ncaption_prefix = 'x'\n{SUBSET}c'\nis_reg = true\nflip_aug = true\n"
    _, first, second = find.toml(text).datasets[0].subsets
    assert (first.settings.rules.caption_prefix, first.settings.images.flip_aug) == ("x", False)
    assert (second.settings.rules.caption_prefix, second.settings.images.flip_aug) == (None, True)
    assert first.repeats + second.repeats == (3, 3, 2, 2)


def test_only_regularization_images_is_a_fault(find, tmp_path):
    write_images(tmp_path / "a", 1)
    with pytest.raises(UserError) as error:
        find.toml(f"[[datasets]]\nresolution = 64\n{SUBSET}a'\nis_reg = true\n")
    assert error.value.code == "only-regularization-images"


def test_numbers_of_batches_and_steps(find, tmp_path):
    write_images(tmp_path / "a", 5)
    write_images(tmp_path / "b", 3, size=(256, 64))
    text = "[general]\nenable_bucket = true\nmin_bucket_reso = 64\nresolution = 128\nbatch_size = 2\n"
    text += f"max_bucket_reso = 256\n[[datasets]]\n{SUBSET}a'\nnum_repeats = 3\n{SUBSET}b'\n"
    plan = find.toml(text)
    assert sum(plan.datasets[0].buckets.values()) == plan.samples_per_epoch == 18
    sizes = plan.datasets[0].buckets
    assert sizes == {(128, 128): 15, (256, 64): 3}
    assert plan.batches_per_epoch == sum(-(-count // 2) for count in sizes.values())
    assert plan.count_steps_per_epoch(4) == -(-plan.batches_per_epoch // 4)
    assert find.toml(text, processes=2).batches_per_epoch == sum(-(-count // 4) for count in sizes.values())
    rows = make_data_rows(plan, accumulation=4)
    assert ("epoch", "samples", "18") in rows
    assert sum(name.startswith("bucket") for _, name, _ in rows) == len(sizes)


def test_small_images_are_skipped_where_asked(find, tmp_path):
    write_images(tmp_path / "a", 2, size=(64, 64))
    write_images(tmp_path / "b", 1, size=(128, 128))
    text = f"[[datasets]]\nresolution = 64\nskip_image_resolution = 64\n{SUBSET}b'\n"
    assert len(list_items(find.toml(text))) == 1
    write_images(tmp_path / "b", 2, size=(64, 64))  # img0 and img1 are small now
    write_images(tmp_path / "b", 1, size=(128, 128))
    plan = find.toml(text)
    assert len(list_items(plan)) == 1
    assert any("skipped 1 image of at most 64x64" in note for note in plan.notes)
