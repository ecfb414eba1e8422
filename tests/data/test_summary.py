"""Finding the data: folders, captions, faults and what nearly matched, balance, numbers, metadata."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from data.conftest import write
from sfumato.config import load_config
from sfumato.data.find import folders
from sfumato.data.find.discover import find_data, table
from sfumato.data.ss_metadata import metadata
from sfumato.errors import Problems, UserError

GOLDENS = Path(__file__).parents[1] / "goldens"
RESOLUTION = ("--resolution", 64)


def items(plan):
    return [item for dataset in plan.datasets for subset in dataset.subsets for item in subset.items]


def captions(plan) -> dict[str, str]:
    return {Path(item.picture.path).name: item.picture.caption for item in items(plan)}


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file's content and time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def test_folders_named_n_text(find, pictures, tmp_path):
    pictures(tmp_path / "train" / "10_sks cat", 2)
    pictures(tmp_path / "train" / "3_dog_of_mine", 1)
    pictures(tmp_path / "reg" / "1_cat", 4)
    (tmp_path / "train" / "notes").mkdir()
    plan = find("--train_data_dir", tmp_path / "train", "--reg_data_dir", tmp_path / "reg", *RESOLUTION)
    found = {subset.settings.image_dir.name: subset for subset in plan.datasets[0].subsets}
    assert [found[name].settings.num_repeats for name in ("10_sks cat", "3_dog_of_mine", "1_cat")] == [10, 3, 1]
    assert found["3_dog_of_mine"].settings.class_tokens == "dog_of_mine"
    assert [subset.settings.is_reg for subset in found.values()] == [False, False, True]
    assert plan.num_train_images == 23
    assert plan.num_reg_images == 4
    assert captions(plan)["img1.png"].startswith("tag1, cat")


def test_caption_files_of_any_usual_ending_are_found_and_told(find, pictures, tmp_path):
    pictures(tmp_path / "t" / "1_a", 3)
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION)  # the default ending is .caption
    assert captions(plan)["img2.png"] == "tag2, cat, 1_a"
    assert any("no .caption files; took the 3 .txt files" in note for note in plan.notes)
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION, "--caption_extension", "txt")
    assert not plan.notes


def test_a_caption_file_of_the_asked_ending_goes_before_others(find, pictures, tmp_path):
    (first, *_) = pictures(tmp_path / "t" / "1_a", 2)
    first.with_suffix(".caption").write_text("asked for")
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION)
    assert captions(plan) == {"img0.png": "asked for", "img1.png": "a"}  # the other one takes the class tokens
    assert any("1 of 2 images have no caption" in note and "'a'" in note for note in plan.notes)


def test_face_crops_share_a_caption(find, pictures, tmp_path):
    (image,) = pictures(tmp_path / "t" / "1_a", 1)
    image.rename(image.with_name("my_face_10_20_30_40.png"))
    image.with_suffix(".txt").rename(image.with_name("my_face.txt"))
    assert captions(find("--train_data_dir", tmp_path / "t", *RESOLUTION)) == {
        "my_face_10_20_30_40.png": "tag0, cat, 1_a"
    }


@pytest.mark.parametrize("policy", ["error", "empty", "skip"])
def test_missing_captions(find, pictures, tmp_path, policy):
    first, second, _ = pictures(tmp_path / "a", 3)
    first.with_suffix(".txt").unlink()
    second.with_suffix(".txt").write_text(" \n")
    (tmp_path / "set.toml").write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path.as_posix()}/a'\n"
    )
    argv = ["--dataset_config", tmp_path / "set.toml", "--caption_extension", ".txt", "--on_missing_caption", policy]
    plan = find.attempt(*argv)
    what = "2 of 3 images have no caption (.txt file beside them), 1 of them an empty file"
    if policy == "error":
        (said,) = find.said
        assert what in said
        assert "img0.png, img1.png" in said
        assert "--on_missing_caption" in said
    else:
        find.problems.raise_all()
        assert any(what in note for note in plan.notes)
        rest = {"img2.png": "tag2, cat, a"}
        assert captions(plan) == (rest if policy == "skip" else {"img0.png": "", "img1.png": "", **rest})


def test_wildcards_take_all_lines(find, pictures, tmp_path):
    (image,) = pictures(tmp_path / "t" / "1_a", 1)
    image.with_suffix(".txt").write_text("one\n\n two \n")
    arguments = ("--train_data_dir", tmp_path / "t", *RESOLUTION)
    assert captions(find(*arguments)) == {"img0.png": "one"}
    assert captions(find(*arguments, "--enable_wildcard")) == {"img0.png": "one\ntwo"}


def test_captions_that_are_not_utf8_name_file_and_line(find, pictures, tmp_path):
    (image,) = pictures(tmp_path / "t" / "1_a", 1)
    image.with_suffix(".txt").write_bytes(b"fine\n" + "größe".encode("cp1252"))
    find.attempt("--train_data_dir", tmp_path / "t", *RESOLUTION)
    (said,) = find.said
    assert said == f"{image.with_suffix('.txt')}, line 2, is not UTF-8 — save it as UTF-8"


def test_a_mark_at_the_start_of_a_caption_is_no_text(find, pictures, tmp_path):
    (image,) = pictures(tmp_path / "t" / "1_a", 1)
    image.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa cat")
    assert captions(find("--train_data_dir", tmp_path / "t", *RESOLUTION)) == {"img0.png": "a cat"}


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_bad_images_are_named(find, pictures, tmp_path, policy):
    pictures(tmp_path / "t" / "1_a", 1)
    (tmp_path / "t" / "1_a" / "img0.png").rename(tmp_path / "t" / "1_a" / "good.png")
    (tmp_path / "t" / "1_a" / "img0.txt").rename(tmp_path / "t" / "1_a" / "good.txt")
    for i in range(22):
        (tmp_path / "t" / "1_a" / f"img{i}.png").write_bytes(b"nonsense" if i else b"")
    plan = find.attempt("--train_data_dir", tmp_path / "t", *RESOLUTION, "--on_bad_image", policy)
    if policy == "error":
        assert len(find.said) == 21
        assert "img0.png is empty (0 bytes)" in find.said[0]
        assert "2 more are bad like those named — `sfumato dataset inspect` names them all" in find.said[-1]
    else:
        assert not find.said
        assert len(items(plan)) == 1
        assert any("22 bad images are left out" in note and "img0.png" in note for note in plan.notes)
        assert any("17 more: `sfumato dataset inspect` names them all" in note for note in plan.notes)


def near_misses(pictures, root: Path) -> None:
    pictures(root / "loose", 2)
    pictures(root / "loose" / "1_cat", 1)
    pictures(root / "unnamed" / "cats", 3)
    pictures(root / "deep" / "1_cat" / "more", 12)
    (root / "nothing").mkdir()
    (root / "other" / "1_cat").mkdir(parents=True)
    for name in ("a.gif", "b.gif", "c.heic"):
        (root / "other" / "1_cat" / name).touch()


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("loose", ["has 2 pictures (img0.png, img1.png) beside the folder 1_cat", "N_text"]),
        ("nothing", ["no pictures in", "it is empty", "folders named N_text with the pictures in them"]),
        ("other", ["no images in", "it holds 2 .gif, 1 .heic, and images end in .png .jpg"]),
    ],
)
def test_where_no_images_are_what_nearly_matched_is_told(find, pictures, tmp_path, folder, words):
    near_misses(pictures, tmp_path)
    find.attempt("--train_data_dir", tmp_path / folder, *RESOLUTION)
    (said,) = find.said
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("files", "expected", "note"),
    [
        (["cats/a.png", "cats/tabby/b.png", "dogs/c.png"], {"cats/a.png": 1, "cats/tabby/b.png": 1, "dogs/c.png": 1},
         "no folder in"),
        (["x/y/3_cat/a.png", "x/2_dog/b.png", "x/z/c.png"], {"a.png": 3, "b.png": 2}, "took those further below"),
        (["5_cat/near/a.png", "5_cat/far/b.png"], {"near/a.png": 5, "far/b.png": 5}, "2 images in the folders below"),
        (["5_cat/a.png", "5_cat/far/b.png"], {"a.png": 5}, "far/b.png) are left out"),
        (["5_cat/a.png", "old/far/b.png"], {"a.png": 5}, "old (1 images) left out"),
    ],
)  # fmt: skip
def test_any_nesting_is_taken_numbered_folders_first(find, tmp_path, files, expected, note):
    for file in files:
        write(tmp_path / "t" / file, caption="a")
    (tmp_path / "t" / "loop").symlink_to(tmp_path / "t")
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION)
    found = {
        os.path.relpath(item.picture.path, subset.settings.image_dir): repeats
        for subset in plan.datasets[0].subsets
        for item, repeats in zip(subset.items, subset.repeats, strict=True)
    }
    assert found == expected
    assert any(note in line for line in plan.notes), plan.notes


def test_a_mistyped_folder_is_recognised(find, pictures, tmp_path):
    pictures(tmp_path / "my_pictures", 1)
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/my_picture'\n"
    with pytest.raises(Exception, match=r"did you mean .*my_pictures"):
        find.toml(text)


def test_a_folder_of_pictures_itself_is_taken_and_told(find, pictures, tmp_path):
    pictures(tmp_path / "5_cat", 2)
    plan = find("--train_data_dir", tmp_path / "5_cat", *RESOLUTION)
    assert plan.num_train_images == 10
    assert any("taken as one" in note for note in plan.notes)


def test_folders_without_a_number_beside_others_are_told(find, pictures, tmp_path):
    pictures(tmp_path / "t" / "1_a", 1)
    pictures(tmp_path / "t" / "later", 4)
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION)
    assert any("later (4 images) left out" in note for note in plan.notes)
    assert len(items(plan)) == 1


SUBSET = "[[datasets.subsets]]\nimage_dir = '{root}/"


def test_repeated_and_empty_subsets(find, pictures, tmp_path):
    pictures(tmp_path / "a", 1)
    pictures(tmp_path / "b", 1)
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\n{SUBSET}./a'\n{SUBSET}b'\nnum_repeats = 0\n"
    plan = find.toml(text)
    assert [subset.settings.image_dir.name for subset in plan.datasets[0].subsets] == ["a"]
    assert sum("left out" in note for note in plan.notes) == 2
    find.attempt("--dataset_config", tmp_path / "dataset.toml", "--strict")
    assert any("a second time" in line for line in find.said)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("", "no resolution is given"),
        ("resolution = 100", "resolution 100,100 is no multiple of 16 — use 96,96"),
        ("resolution = 512\nenable_bucket = true\nbucket_reso_steps = 48", "set bucket_reso_steps to 64"),
        ("resolution = 128\nenable_bucket = true", "resolution 128 is below min_bucket_reso 256"),
        ("resolution = 2048\nenable_bucket = true", "resolution 2048 is above max_bucket_reso 1024"),
        ("resolution = 512\nenable_bucket = true\nmin_bucket_reso = 600\nmax_bucket_reso = 500", "is above max_bucket"),
    ],
)
def test_sizes_that_cannot_be(find, pictures, tmp_path, dataset, words):
    pictures(tmp_path / "a", 1)
    with pytest.raises(Exception, match=r"datasets\[0\]") as caught:
        find.toml(f"[[datasets]]\n{dataset}\n{SUBSET}a'\n")
    assert words in str(caught.value)


def test_limits_are_rounded_to_the_step_and_told(find, pictures, tmp_path):
    pictures(tmp_path / "a", 1, size=(500, 300))
    limits = "min_bucket_reso = 300\nmax_bucket_reso = 900\n"
    text = f"[[datasets]]\nresolution = 512\nenable_bucket = true\n{limits}{SUBSET}a'"
    plan = find.toml(text)
    assert (plan.datasets[0].settings.buckets.shortest, plan.datasets[0].settings.buckets.longest) == (256, 960)
    assert any("buckets go from 256 to 960" in note for note in plan.notes)


def test_options_without_effect_are_told(find, pictures, tmp_path):
    pictures(tmp_path / "a", 1)
    plan = find.toml(
        f"[[datasets]]\nresolution = 64\nbucket_no_upscale = true\n{SUBSET}a'\n", "--prior_loss_weight", 0.5
    )
    assert any("bucket_no_upscale has no effect" in note for note in plan.notes)
    assert any("--prior_loss_weight has no effect" in note for note in plan.notes)


def test_the_cache_may_not_lie_among_the_pictures(find, pictures, tmp_path):
    pictures(tmp_path / "t" / "1_a", 1)
    before = tree(tmp_path / "t")
    find.attempt("--train_data_dir", tmp_path / "t", *RESOLUTION, "--cache_dir", tmp_path / "t" / "1_a" / "cache")
    assert "nothing is ever written" in find.said[0]
    assert tree(tmp_path / "t") == before


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
def test_regularisation_images_are_balanced(find, pictures, tmp_path, own, count, train, expected):
    pictures(tmp_path / "t" / f"{train}_cat", 1)
    pictures(tmp_path / "r" / f"{own}_cat", count)
    plan = find("--train_data_dir", tmp_path / "t", "--reg_data_dir", tmp_path / "r", *RESOLUTION)
    _, regular = plan.datasets[0].subsets
    assert list(regular.repeats) == expected
    assert plan.num_reg_images == own * count
    assert plan.samples_per_epoch == train + sum(expected)
    assert any("more than needed" in note for note in plan.notes) == (0 in expected)


def test_several_regularisation_subsets_keep_their_own_settings(find, pictures, tmp_path):
    for name in "abc":
        pictures(tmp_path / name, 2)
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\nnum_repeats = 5\n"
    text += f"{SUBSET}b'\nis_reg = true\ncaption_prefix = 'x'\n{SUBSET}c'\nis_reg = true\nflip_aug = true\n"
    _, first, second = find.toml(text).datasets[0].subsets
    assert (first.settings.rules.caption_prefix, first.settings.images.flip_aug) == ("x", False)
    assert (second.settings.rules.caption_prefix, second.settings.images.flip_aug) == (None, True)
    assert first.repeats + second.repeats == (3, 3, 2, 2)


def test_only_regularisation_images_is_a_fault(find, pictures, tmp_path):
    pictures(tmp_path / "a", 1)
    with pytest.raises(Exception, match="only regularisation images"):
        find.toml(f"[[datasets]]\nresolution = 64\n{SUBSET}a'\nis_reg = true\n")


def test_numbers_of_batches_and_steps(find, pictures, tmp_path):
    pictures(tmp_path / "a", 5)
    pictures(tmp_path / "b", 3, size=(256, 64))
    text = "[general]\nenable_bucket = true\nmin_bucket_reso = 64\nresolution = 128\nbatch_size = 2\n"
    text += f"max_bucket_reso = 256\n[[datasets]]\n{SUBSET}a'\nnum_repeats = 3\n{SUBSET}b'\n"
    plan = find.toml(text)
    assert sum(plan.datasets[0].buckets.values()) == plan.samples_per_epoch == 18
    sizes = plan.datasets[0].buckets
    assert sizes == {(128, 128): 15, (256, 64): 3}
    assert plan.batches_per_epoch == sum(-(-count // 2) for count in sizes.values())
    assert plan.steps_per_epoch(4) == -(-plan.batches_per_epoch // 4)
    assert find.toml(text, processes=2).batches_per_epoch == sum(-(-count // 4) for count in sizes.values())
    rows = table(plan, accumulation=4)
    assert ("epoch", "samples", "18") in rows
    assert sum(name.startswith("bucket") for _, name, _ in rows) == len(sizes)


def test_small_images_are_skipped_where_asked(find, pictures, tmp_path):
    pictures(tmp_path / "a", 2, size=(64, 64))
    pictures(tmp_path / "b", 1, size=(128, 128))
    text = f"[[datasets]]\nresolution = 64\nskip_image_resolution = 64\n{SUBSET}b'\n"
    assert len(items(find.toml(text))) == 1
    pictures(tmp_path / "b", 2, size=(64, 64))  # img0 and img1 are small now
    pictures(tmp_path / "b", 1, size=(128, 128))
    plan = find.toml(text)
    assert len(items(plan)) == 1
    assert any("1 images of at most 64x64 are skipped" in note for note in plan.notes)


def test_what_is_remembered_is_used_only_while_it_is_true(find, pictures, tmp_path, monkeypatch):
    first, second, third = pictures(tmp_path / "t" / "1_a", 3)
    arguments = ("--train_data_dir", tmp_path / "t", *RESOLUTION)
    cold = find(*arguments)
    read: list[str] = []
    original = folders.header_at

    def counted(descriptor, path, size):
        read.append(Path(path).name)
        return original(descriptor, path, size)

    monkeypatch.setattr(folders, "header_at", counted)
    assert find(*arguments).datasets[0].subsets[0].items == cold.datasets[0].subsets[0].items
    assert read == []
    shutil.copy(second, first)  # another size in bytes
    os.utime(third, ns=(1, 1))
    first.with_suffix(".txt").write_text("edited")
    warm = find(*arguments)
    assert sorted(read) == ["img0.png", "img2.png"]
    assert captions(warm)["img0.png"] == "edited"


@pytest.mark.parametrize("damage", [b"", b"{", b"PK\3\4", b"\xff\xfe", None])
def test_a_damaged_index_costs_only_time(find, pictures, tmp_path, damage):
    pictures(tmp_path / "t" / "1_a", 2)
    arguments = ("--train_data_dir", tmp_path / "t", *RESOLUTION)
    cold = find(*arguments)
    indexes = list((tmp_path / "cache" / "folders").iterdir())
    assert len(indexes) == 2  # sizes and captions
    for index in indexes:
        index.write_bytes(damage if damage is not None else index.read_bytes()[:-400])
    assert find(*arguments).datasets == cold.datasets
    assert all(len(index.read_bytes()) > 1000 for index in indexes)  # made anew


def test_pictures_are_left_as_they_are(find, pictures, tmp_path):
    pictures(tmp_path / "t" / "1_a", 3)
    (tmp_path / "t" / "1_a" / ".ipynb_checkpoints").mkdir()
    before = tree(tmp_path / "t")
    find("--train_data_dir", tmp_path / "t", *RESOLUTION)
    assert tree(tmp_path / "t") == before


def test_metadata_has_the_recorded_keys(find, pictures, tmp_path):
    golden = json.loads((GOLDENS / "metadata_keys.json").read_text())
    pictures(tmp_path / "1_a", 2, size=(80, 64))
    pictures(tmp_path / "1_b", 1)
    first = "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 256\n"
    subsets = f"{SUBSET}1_a'\n{SUBSET}1_b'\nis_reg = true\n"
    with_file = metadata(find.toml(f"{first}{subsets}[[datasets]]\nresolution = 128\n{SUBSET}1_a'\n"))
    only_with, only_without = (set(golden["when"][f"only {word} --dataset_config"]) for word in ("with", "without"))
    assert only_with <= set(with_file)
    assert not (only_without - only_with) & set(with_file)
    assert list(with_file["ss_datasets"][0]) == golden["ss_datasets_item_keys"]
    plain = [key.split()[0] for key in golden["ss_datasets_subset_keys"] if ":" not in key]
    assert set(plain) <= set(with_file["ss_datasets"][0]["subsets"][0])
    assert with_file["ss_dataset_dirs"] == {
        "1_a": {"n_repeats": 1, "img_count": 2},
        "1_a (2)": {"n_repeats": 1, "img_count": 2},
    }
    assert with_file["ss_tag_frequency"]["1_a"] == {"tag0": 1, "cat": 2, "1_a": 2, "tag1": 1}
    assert str(tmp_path) not in json.dumps(with_file)

    (tmp_path / "t").mkdir()
    (tmp_path / "1_a").rename(tmp_path / "t" / "1_a")
    flat = metadata(find("--train_data_dir", tmp_path / "t", *RESOLUTION))
    assert only_without <= set(flat)
    assert flat["ss_bucket_info"] is None
    assert flat["ss_resolution"] == "(64, 64)"
    assert str(tmp_path) not in json.dumps(flat)


def test_the_default_cache_folder_is_used(find, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    pictures(tmp_path / "t" / "1_a", 1)
    (tmp_path / "m.safetensors").touch()
    argv = ["--pretrained_model_name_or_path", "m.safetensors", "--output_dir", "o", "--resolution", "64"]
    monkeypatch.chdir(tmp_path)
    problems = Problems()
    find_data(load_config([*argv, "--train_data_dir", "t"]), bucket_step=8, problems=problems)
    problems.raise_all()
    assert list((tmp_path / "home" / "sfumato" / "folders").iterdir())


def test_a_subset_of_which_nothing_is_left_is_a_fault(find, pictures, tmp_path):
    for path in pictures(tmp_path / "a", 2):
        path.with_suffix(".txt").unlink()
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\n"
    with pytest.raises(UserError, match="every image is left out"):
        find.toml(text, "--on_missing_caption", "skip")
    with pytest.raises(UserError, match="nothing is left to train on"):
        find.toml(f"{text}class_tokens = 'a'\n".replace("64", "64\nskip_image_resolution = 64"))


@pytest.mark.parametrize(
    ("argv", "dataset", "subset", "words"),
    [
        (("--resolution", 512), "resolution = 64", "", "--resolution has no effect: dataset.toml gives resolution"),
        (("--keep_tokens", 2), "resolution = 64", "keep_tokens = 0", "--keep_tokens has no effect: dataset.toml gives"),
        ((), "resolution = 64", "keep_tokens = 2", "keep_tokens has no effect without shuffle_caption"),
        ((), "resolution = 64", "token_warmup_min = 2", "token_warmup_min has no effect without token_warmup_step"),
        ((), "resolution = 64\nmin_bucket_reso = 64", "", "min_bucket_reso: no effect without enable_bucket"),
        (
            (),
            "resolution = 64\nenable_bucket = true\nbucket_no_upscale = true\nmax_bucket_reso = 64",
            "",
            "max_bucket_reso: no effect with bucket_no_upscale",
        ),
    ],
)
def test_what_has_no_effect_is_told(find, pictures, tmp_path, argv, dataset, subset, words):
    pictures(tmp_path / "a", 1)
    text = f"[[datasets]]\n{dataset}\n{SUBSET}a'\n{subset}\n"
    assert any(words in note for note in find.toml(text, *argv).notes)
    with pytest.raises(UserError) as caught:
        find.toml(text, *argv, "--strict")
    assert words in str(caught.value)


def test_repeats_of_folders_go_before_the_option(find, pictures, tmp_path):
    pictures(tmp_path / "t" / "3_a", 1)
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION, "--dataset_repeats", 7)
    assert plan.num_train_images == 3
    assert any("--dataset_repeats has no effect" in note for note in plan.notes)
    pictures(tmp_path / "leaf", 2)
    assert find("--train_data_dir", tmp_path / "leaf", *RESOLUTION, "--dataset_repeats", 7).num_train_images == 14
