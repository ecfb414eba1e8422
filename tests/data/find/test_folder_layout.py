"""The subsets that folders named N_text make, and what is reported of folders with other names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.conftest import write_image, write_images
from data.dataset_files import (
    RESOLUTION,
    list_captions,
    list_items,
)
from sfumato.errors import UserError


def test_folders_named_n_text(find, tmp_path):
    write_images(tmp_path / "train" / "10_sks cat", 2)
    write_images(tmp_path / "train" / "3_dog_of_mine", 1)
    write_images(tmp_path / "reg" / "1_cat", 4)
    (tmp_path / "train" / "notes").mkdir()
    plan = find("--train_data_dir", tmp_path / "train", "--reg_data_dir", tmp_path / "reg", *RESOLUTION)
    subsets = {subset.settings.image_dir.name: subset for subset in plan.datasets[0].subsets}
    assert [subsets[name].settings.num_repeats for name in ("10_sks cat", "3_dog_of_mine", "1_cat")] == [10, 3, 1]
    assert subsets["3_dog_of_mine"].settings.class_tokens == "dog_of_mine"
    assert [subset.settings.is_reg for subset in subsets.values()] == [False, False, True]
    assert plan.num_train_images == 23
    assert plan.num_reg_images == 4
    assert list_captions(plan)["img1.png"].startswith("tag1, cat")


def write_near_misses(root: Path) -> None:
    write_images(root / "loose", 2)
    write_images(root / "loose" / "1_cat", 1)
    write_images(root / "unnamed" / "cats", 3)
    write_images(root / "deep" / "1_cat" / "more", 12)
    (root / "nothing").mkdir()
    (root / "other" / "1_cat").mkdir(parents=True)
    for name in ("a.psd", "b.psd", "c.cr2"):
        (root / "other" / "1_cat" / name).touch()


@pytest.mark.parametrize(
    ("folder", "code", "words"),
    [
        ("loose", "images-beside-numbered-folders", ["2 images", "img0.png, img1.png", "1_cat", "N_text"]),
        ("nothing", "data-folder-without-images", ["nothing", "N_text"]),
        ("other", "subset-without-images", ["2 .psd, 1 .cr2", ".png .apng .jpg"]),
    ],
)
def test_where_no_images_are_found_near_matches_are_reported(find, tmp_path, folder, code, words):
    write_near_misses(tmp_path)
    find.attempt("--train_data_dir", tmp_path / folder, *RESOLUTION)
    (problem,) = find.problems.found
    assert problem.code == code
    assert all(word in str(problem) for word in words), problem


@pytest.mark.parametrize(
    ("files", "expected", "note"),
    [
        (["cats/a.png", "cats/tabby/b.png", "dogs/c.png"], {"cats/a.png": 1, "cats/tabby/b.png": 1, "dogs/c.png": 1},
         "no folder in"),
        (["x/y/3_cat/a.png", "x/2_dog/b.png", "x/z/c.png"], {"a.png": 3, "b.png": 2}, "x/2_dog, x/y/3_cat"),
        (["5_cat/near/a.png", "5_cat/far/b.png"], {"near/a.png": 5, "far/b.png": 5}, "2 images in the subfolders"),
        (["5_cat/a.png", "5_cat/far/b.png"], {"a.png": 5}, "far/b.png) are skipped"),
        (["5_cat/a.png", "old/far/b.png"], {"a.png": 5}, "old (1 image)"),
    ],
)  # fmt: skip
def test_folders_at_any_depth_are_used_numbered_ones_first(find, tmp_path, files, expected, note):
    for file in files:
        write_image(tmp_path / "t" / file, caption="a")
    (tmp_path / "t" / "loop").symlink_to(tmp_path / "t")
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION)
    repeats: dict[str, int] = {}
    for subset in plan.datasets[0].subsets:
        for item, count in zip(subset.items, subset.repeats, strict=True):
            repeats[os.path.relpath(item.image.path, subset.settings.image_dir)] = count
    assert repeats == expected
    assert any(note in line for line in plan.notes), plan.notes


def test_a_mistyped_folder_is_recognized(find, tmp_path):
    write_images(tmp_path / "my_images", 1)
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/my_image'\n"
    with pytest.raises(UserError, match="my_images") as error:
        find.toml(text)
    assert error.value.code == "subset-folder-unreadable"


def test_a_folder_of_images_is_one_subset(find, tmp_path):
    write_images(tmp_path / "5_cat", 2)
    plan = find("--train_data_dir", tmp_path / "5_cat", *RESOLUTION)
    assert plan.num_train_images == 10
    assert any("one subset" in note for note in plan.notes)


def test_skipped_folders_without_a_number_are_reported(find, tmp_path):
    write_images(tmp_path / "t" / "1_a", 1)
    write_images(tmp_path / "t" / "later", 4)
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION)
    assert any("skipped later (4 images)" in note for note in plan.notes)
    assert len(list_items(plan)) == 1


def test_repeats_of_folders_take_precedence_over_the_option(find, tmp_path):
    write_images(tmp_path / "t" / "3_a", 1)
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION, "--dataset_repeats", 7)
    assert plan.num_train_images == 3
    assert any("--dataset_repeats has no effect" in note for note in plan.notes)
    write_images(tmp_path / "leaf", 2)
    assert find("--train_data_dir", tmp_path / "leaf", *RESOLUTION, "--dataset_repeats", 7).num_train_images == 14
