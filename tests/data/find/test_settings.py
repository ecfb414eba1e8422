"""The settings of datasets and subsets: precedence, contradictions, options without an effect."""

from __future__ import annotations

import pytest

from data.conftest import write_images
from data.dataset_files import (
    SUBSET,
)
from sfumato.config.schema import vocabulary
from sfumato.errors import UserError

SUBSET_A = f"{SUBSET}a'\n"


@pytest.mark.parametrize(
    ("argv", "general", "dataset", "subset", "value"),
    [
        ([], "", "", "", 0),
        (["--keep_tokens", 1], "", "", "", 1),
        (["--keep_tokens", 1], "keep_tokens = 2", "", "", 2),
        (["--keep_tokens", 1], "keep_tokens = 2", "keep_tokens = 3", "", 3),
        (["--keep_tokens", 1], "keep_tokens = 2", "keep_tokens = 3", "keep_tokens = 4", 4),
        (["--keep_tokens", 1], "keep_tokens = 2", "", "keep_tokens = 0", 0),  # 0 is a value, too
    ],
)
def test_precedence_of_the_levels(find, tmp_path, argv, general, dataset, subset, value):
    write_images(tmp_path / "a", 1)
    text = f"[general]\n{general}\n[[datasets]]\nresolution = 64\n{dataset}\n{SUBSET_A}{subset}\n"
    (planned,) = find.toml(text, *argv).datasets
    assert planned.subsets[0].settings.rules.keep_tokens == value


def test_dataset_keys_fall_back_to_the_command_line(find, tmp_path):
    write_images(tmp_path / "a", 1)
    text = f"[[datasets]]\n{SUBSET_A}[[datasets]]\nbatch_size = 5\nresolution = [128, 64]\n{SUBSET_A}"
    first, second = find.toml(text, "--resolution", 64, "--train_batch_size", 3).datasets
    assert (first.settings.batch_size, first.settings.resolution) == (3, (64, 64))
    assert (second.settings.batch_size, second.settings.resolution) == (5, (128, 64))


# key -> five values: default, command line, [general], dataset, subset
LEVELS = {
    "caption_separator": (",", ";", "|", "/", "+"),
    "caption_prefix": (None, "a", "b", "c", "d"),
    "caption_suffix": (None, "a", "b", "c", "d"),
    "shuffle_caption": (False, True, False, True, False),
    "keep_tokens": (0, 1, 2, 3, 4),
    "keep_tokens_separator": ("", "|||", "||", "|", "+++"),
    "secondary_separator": (None, ";;", "::", "++", "--"),
    "enable_wildcard": (False, True, False, True, False),
    "token_warmup_min": (1, 2, 3, 4, 5),
    "token_warmup_step": (0.0, 1.0, 0.5, 2.0, 0.25),
    "caption_dropout_rate": (0.0, 0.1, 0.2, 0.3, 0.4),
    "caption_dropout_every_n_epochs": (0, 1, 2, 3, 4),
    "caption_tag_dropout_rate": (0.0, 0.1, 0.2, 0.3, 0.4),
    "caption_extension": (".caption", ".a", ".b", ".c", ".d"),
    "num_repeats": (1, 2, 3, 4, 5),
    "class_tokens": (None, None, "b", "c", "d"),
    "flip_aug": (False, True, False, True, False),
    "color_aug": (False, True, False, True, False),
    "resize_interpolation": (None, "area", "box", "linear", "cubic"),
    "custom_attributes": ({}, {}, {"a": 1}, {"b": 2}, {"c": 3}),
}


def spell_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {item}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.mark.parametrize("key", LEVELS)
def test_every_subset_key_is_read_at_every_level(find, tmp_path, key):
    """Default, command line, [general], dataset, subset: each takes precedence over those to its left."""
    write_images(tmp_path / "a", 1)
    option = {"num_repeats": "dataset_repeats"}.get(key, key)
    values = LEVELS[key]
    for levels in range(5):
        argv: list[object] = []
        if levels >= 1 and option in vocabulary():
            flag = isinstance(values[1], bool)
            argv = [f"--{option}"] if flag else [f"--{option}", values[1]]
        lines = [f"{key} = {spell_toml(value)}\n" if levels >= i else "" for i, value in enumerate(values[2:], 2)]
        text = f"[general]\n{lines[0]}[[datasets]]\nresolution = 64\n{lines[1]}{SUBSET_A}{lines[2]}"
        plan = find.toml(text, *argv, "--on_missing_caption", "empty")
        settings = plan.datasets[0].subsets[0].settings
        value = {**vars(settings), **vars(settings.images), **vars(settings.rules)}[key]
        assert value == values[levels], levels


def test_unread_attributes_are_reported(find, tmp_path):
    write_images(tmp_path / "a", 1)
    plan = find.toml(f"[[datasets]]\nresolution = 64\n{SUBSET_A}custom_attributes = {{ mood = 'calm' }}\n")
    assert any("custom_attributes.mood has no effect: nothing reads it" in note for note in plan.notes)
    assert plan.datasets[0].subsets[0].settings.custom_attributes == {"mood": "calm"}


def test_repeated_and_empty_subsets(find, tmp_path):
    write_images(tmp_path / "a", 1)
    write_images(tmp_path / "b", 1)
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\n{SUBSET}./a'\n{SUBSET}b'\nnum_repeats = 0\n"
    plan = find.toml(text)
    assert [subset.settings.image_dir.name for subset in plan.datasets[0].subsets] == ["a"]
    assert sum("is skipped" in note for note in plan.notes) == 2
    find.attempt("--dataset_config", tmp_path / "dataset.toml", "--strict")
    assert find.codes == ["data-option-without-effect"]


@pytest.mark.parametrize(
    ("dataset", "code", "values"),
    [
        ("", "dataset-resolution-missing", []),
        ("resolution = 512\nenable_bucket = true\nbucket_reso_steps = 48", "bucket-step-not-multiple", ["48", "64"]),
        ("resolution = 128\nenable_bucket = true", "resolution-below-buckets", ["128", "256"]),
        ("resolution = 2048\nenable_bucket = true", "resolution-above-buckets", ["2048", "1024"]),
        ("resolution = 1000000", "resolution-too-large", ["1000000,1000000", "178956970"]),
        ("resolution = [8, 100000000]\nenable_bucket = true", "resolution-too-large", ["8,100000000"]),
        (
            "resolution = 512\nenable_bucket = true\nmin_bucket_reso = 600\nmax_bucket_reso = 500",
            "bucket-limits-swapped",
            ["600", "500"],
        ),
    ],
)
def test_contradicting_sizes(find, tmp_path, dataset, code, values):
    write_images(tmp_path / "a", 1)
    with pytest.raises(UserError, match=r"datasets\[0\]") as error:
        find.toml(f"[[datasets]]\n{dataset}\n{SUBSET}a'\n")
    assert error.value.code == code
    assert all(value in str(error.value) for value in values)


def test_limits_are_rounded_to_the_step_and_reported(find, tmp_path):
    write_images(tmp_path / "a", 1, size=(500, 300))
    limits = "min_bucket_reso = 300\nmax_bucket_reso = 900\n"
    text = f"[[datasets]]\nresolution = 512\nenable_bucket = true\n{limits}{SUBSET}a'"
    plan = find.toml(text)
    assert (plan.datasets[0].settings.buckets.shortest, plan.datasets[0].settings.buckets.longest) == (256, 960)
    assert any("buckets go from 256 to 960" in note for note in plan.notes)


def test_bucket_and_prior_options_without_effect_are_reported(find, tmp_path):
    write_images(tmp_path / "a", 1)
    plan = find.toml(
        f"[[datasets]]\nresolution = 64\nbucket_no_upscale = true\n{SUBSET}a'\n", "--prior_loss_weight", 0.5
    )
    assert any("bucket_no_upscale has no effect" in note for note in plan.notes)
    assert any("--prior_loss_weight has no effect" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("argv", "dataset", "subset", "words"),
    [
        (("--resolution", 512), "resolution = 64", "", "--resolution has no effect: dataset.toml gives resolution"),
        (("--keep_tokens", 2), "resolution = 64", "keep_tokens = 0", "--keep_tokens has no effect: dataset.toml gives"),
        ((), "resolution = 64", "keep_tokens = 2", "keep_tokens has no effect without shuffle_caption"),
        (("--shuffle_caption",), "resolution = 64", "caption_separator = ''", "caption_separator is empty"),
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
def test_options_without_effect_are_reported(find, tmp_path, argv, dataset, subset, words):
    write_images(tmp_path / "a", 1)
    text = f"[[datasets]]\n{dataset}\n{SUBSET}a'\n{subset}\n"
    assert any(words in note for note in find.toml(text, *argv).notes)
    with pytest.raises(UserError) as error:
        find.toml(text, *argv, "--strict")
    assert error.value.code == "data-option-without-effect"
    assert words in error.value.what


@pytest.mark.parametrize(
    ("given", "step", "rounded"),
    [("[512, 650]", 8, (512, 648)), ("[512, 650]", 16, (512, 640)), ("512", 8, (512, 512)), ("4", 8, (8, 8))],
)
def test_without_buckets_a_size_is_rounded_down(find, tmp_path, given, step, rounded):
    write_images(tmp_path / "a", 1)
    plan = find.toml(f"[[datasets]]\nresolution = {given}\n{SUBSET}a'\n", size_step=step)
    assert plan.datasets[0].settings.resolution == rounded
    assert list(plan.buckets) == [rounded]
    assert any("is rounded to" in note for note in plan.notes) == (given != "512")
