"""The dataset file: what is accepted, which value counts, and how faults are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.config.dataset_toml import (
    DATASET_KEYS,
    ONLY_SUBSET_KEYS,
    OPTION_OF,
    SUBSET_KEYS,
    DatasetFile,
    read_dataset_config,
)
from sfumato.config.schema import vocabulary
from sfumato.errors import Problems

LEAST = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'pictures'\n"


def read(path: Path) -> DatasetFile:
    problems = Problems()
    file = read_dataset_config(path, problems)
    problems.raise_all()
    assert file is not None
    return file


def faults(path: Path) -> list[str]:
    problems = Problems()
    read_dataset_config(path, problems)
    assert problems.found
    return [str(each) for each in problems.found]


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes, name: str = "set.toml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_every_kind_of_value(write):
    file = read(
        write("""
[general]
caption_extension = ".txt"
keep_tokens = 1
[[datasets]]
resolution = [512, 768]
batch_size = 4
network_multiplier = 0.5
  [[datasets.subsets]]
  image_dir = "bilder/größe"
  num_repeats = 0
  flip_aug = true
  token_warmup_step = 0.5
  is_reg = true
  caption_prefix = "日本語"
[[datasets]]
resolution = "640,448"
  [[datasets.subsets]]
  image_dir = "b"
""")
    )
    assert file.general.value("keep_tokens") == 1
    first, second = file.datasets
    assert first.table.value("resolution") == (512, 768)
    assert second.table.value("resolution") == (640, 448)
    assert first.subsets[0].value("image_dir") == Path("bilder/größe")
    assert first.subsets[0].value("num_repeats") == 0
    assert first.subsets[0].value("caption_prefix") == "日本語"
    assert first.subsets[0].value("keep_tokens") is None  # not given here


def test_a_mark_at_the_start_and_json_are_read(write):
    assert read(write(b"\xef\xbb\xbf" + LEAST.encode())).datasets
    text = '{"datasets": [{"resolution": 512, "subsets": [{"image_dir": "a", "class_tokens": null}]}]}'
    assert read(write(text, "set.json")).datasets[0].subsets[0].value("class_tokens") is None


def test_every_fault_is_told_at_once_with_its_place(write):
    path = write("""
general = { caption_extention = ".txt", image_dir = "x", shuffle_caption = 1 }
[[datasets]]
resolution = "large"
batch_sise = 2
train_batch_size = 3
min_bucket_reso = -4
  [[datasets.subsets]]
  image_dir = "a"
  [[datasets.subsets]]
  image_dir = "b"
  num_repeats = 1.5
  resolution = 3
  resize_interpolation = "lancsoz"
  face_crop_aug_range = [4.0, 2.0]
  keep_tokens = true
  caption_dropout_rate = 2
""")
    told = {line.removeprefix(f"{path}: ") for line in faults(path)}
    not_a_range = "is not a range; write two numbers, the smaller first, as 2.0,4.0"
    assert told == {
        "general.shuffle_caption is 1, not true or false",
        "unknown key general.caption_extention — did you mean 'caption_extension'?",
        "unknown key general.image_dir — it belongs in [[datasets.subsets]]",
        'datasets[0].resolution = "large" is not a size; write 512, or 512,768 for width and height',
        "unknown key datasets[0].batch_sise — did you mean 'batch_size'?",
        "unknown key datasets[0].train_batch_size — here it is called 'batch_size'",
        "datasets[0].min_bucket_reso is -4, but must be at least 1",
        "datasets[0].subsets[1].num_repeats is 1.5, not a whole number",
        "unknown key datasets[0].subsets[1].resolution — it belongs in [general] or [[datasets]]",
        "datasets[0].subsets[1].resize_interpolation is \"lancsoz\" — did you mean 'lanczos'?",
        f"datasets[0].subsets[1].face_crop_aug_range = [4.0, 2.0] {not_a_range}",
        "datasets[0].subsets[1].keep_tokens is true, not a whole number",
        "datasets[0].subsets[1].caption_dropout_rate is 2, but must be at most 1.0",
    }


def test_contradictions_and_missing_parts(write):
    path = write("""
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  num_repeats = 1
[[datasets]]
resolution = 512
""")
    told = [line.removeprefix(f"{path}: ") for line in faults(path)]
    assert told == [
        'datasets[0].subsets[0].image_dir is required — write image_dir = "folder/of/images"',
        "datasets[1] has no subsets — add a [[datasets.subsets]] table with image_dir below it",
    ]
    assert "no [[datasets]]" in faults(write("[general]\n"))[0]


def test_no_key_is_still_to_come():
    """Nothing here would refuse it."""
    assert not [key for key, option in OPTION_OF.items() if vocabulary()[option].facts.planned]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LEAST + "image_dir = 'b'\n", ["not valid TOML", "given twice"]),
        ("[general]\n[general]\n" + LEAST, ["not valid TOML", "given twice"]),
        (LEAST + 'class_tokens = "C:\\images"\n', ["not valid TOML", "'single quotes'"]),
        (LEAST.encode() + "class_tokens = 'größe'".encode("cp1252"), ["line 5", "is not UTF-8"]),
        ("subsets = [", ["not valid TOML"]),
    ],
)
def test_unreadable_files(write, content, words):
    (told,) = faults(write(content))
    assert all(word in told for word in words), told


def test_other_kinds_of_files(write, tmp_path):
    assert "neither .toml nor .json" in faults(write("a: 1", "set.yaml"))[0]
    assert "given twice" in faults(write('{"datasets": [], "datasets": []}', "set.json"))[0]
    assert "does not hold a JSON object" in faults(write("[1]", "set.json"))[0]
    assert "cannot be read" in faults(tmp_path / "none.toml")[0]


def test_single_letter_slips_are_recognised(write):
    """Every known key with its last letter missing is told as unknown, with the right spelling."""
    for key in {**DATASET_KEYS, **SUBSET_KEYS, **ONLY_SUBSET_KEYS}:
        level = LEAST.replace("resolution = 512\n", "") if key in DATASET_KEYS else LEAST
        text = f"[[datasets]]\n{key[:-1]} = 1\n" if key in DATASET_KEYS else f"{level}{key[:-1]} = 1\n"
        assert any(f"did you mean '{key}'?" in line for line in faults(write(text))), key


def test_keys_are_options_of_the_vocabulary():
    for keys in (DATASET_KEYS, SUBSET_KEYS, ONLY_SUBSET_KEYS):
        assert not {option for option in keys.values() if option not in vocabulary()}


SUBSET = "[[datasets.subsets]]\nimage_dir = '{root}/a'\n"


@pytest.mark.parametrize(
    ("argv", "general", "dataset", "subset", "value"),
    [
        ([], "", "", "", 0),
        (["--keep_tokens", 1], "", "", "", 1),
        (["--keep_tokens", 1], "keep_tokens = 2", "", "", 2),
        (["--keep_tokens", 1], "keep_tokens = 2", "keep_tokens = 3", "", 3),
        (["--keep_tokens", 1], "keep_tokens = 2", "keep_tokens = 3", "keep_tokens = 4", 4),
        (["--keep_tokens", 1], "keep_tokens = 2", "", "keep_tokens = 0", 0),  # given, so it counts
    ],
)
def test_the_nearest_value_counts(find, pictures, tmp_path, argv, general, dataset, subset, value):
    pictures(tmp_path / "a", 1)
    text = f"[general]\n{general}\n[[datasets]]\nresolution = 64\n{dataset}\n{SUBSET}{subset}\n"
    (found,) = find.toml(text, *argv).datasets
    assert found.subsets[0].settings.rules.keep_tokens == value


def test_dataset_keys_fall_back_to_the_command_line(find, pictures, tmp_path):
    pictures(tmp_path / "a", 1)
    text = f"[[datasets]]\n{SUBSET}[[datasets]]\nbatch_size = 5\nresolution = [128, 64]\n{SUBSET}"
    first, second = find.toml(text, "--resolution", 64, "--train_batch_size", 3).datasets
    assert (first.settings.batch_size, first.settings.resolution) == (3, (64, 64))
    assert (second.settings.batch_size, second.settings.resolution) == (5, (128, 64))


# key -> (dataset, subset) settings it ends up in, and five values: built in, command line, [general], dataset, subset
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


def spelled(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {each}" for key, each in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.mark.parametrize("key", LEVELS)
def test_every_subset_key_counts_at_every_level(find, pictures, tmp_path, key):
    """Built-in default, command line, [general], dataset, subset: each goes before those to its left."""
    pictures(tmp_path / "a", 1)
    option = {"num_repeats": "dataset_repeats"}.get(key, key)
    values = LEVELS[key]
    for levels in range(5):
        argv: list[object] = []
        if levels >= 1 and option in vocabulary():
            flag = isinstance(values[1], bool)
            argv = [f"--{option}"] if flag else [f"--{option}", values[1]]
        lines = [f"{key} = {spelled(value)}\n" if levels >= i else "" for i, value in enumerate(values[2:], 2)]
        text = f"[general]\n{lines[0]}[[datasets]]\nresolution = 64\n{lines[1]}{SUBSET}{lines[2]}"
        plan = find.toml(text, *argv, "--on_missing_caption", "empty")
        found = plan.datasets[0].subsets[0].settings
        got = {**vars(found), **vars(found.images), **vars(found.rules)}[key]
        assert got == values[levels], levels


@pytest.mark.parametrize("key", DATASET_KEYS)
def test_dataset_keys_are_refused_in_subsets(write, key):
    """They decide about batches, which subsets share."""
    (told,) = faults(write(f"{LEAST}{key} = 512\n"))
    assert told.endswith(f"unknown key datasets[0].subsets[0].{key} — it belongs in [general] or [[datasets]]")


@pytest.mark.parametrize("key", [*ONLY_SUBSET_KEYS, "image_dir", "is_reg"])
def test_keys_of_one_source_are_refused_above_it(write, key):
    (told,) = faults(write(f"[general]\n{key} = 1\n{LEAST}"))
    assert told.endswith(f"unknown key general.{key} — it belongs in [[datasets.subsets]]")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            "metadata_file = 'm.json'\ncaption_extension = '.txt'",
            "caption_extension has no meaning beside metadata_file",
        ),
        (
            "is_reg = true\nconditioning_data_dir = 'm'",
            "conditioning_data_dir has no meaning for regularisation images",
        ),
        ("custom_attributes = { diff_output_preservation = 'yes' }", "diff_output_preservation is neither true nor"),
    ],
)
def test_contradictions_inside_a_subset(write, lines, words):
    assert any(words in line for line in faults(write(f"{LEAST}{lines}\nkeep_token = 1\n")))


def test_attributes_that_nothing_reads_are_told(find, pictures, tmp_path):
    pictures(tmp_path / "a", 1)
    plan = find.toml(f"[[datasets]]\nresolution = 64\n{SUBSET}custom_attributes = {{ mood = 'calm' }}\n")
    assert any("custom_attributes.mood has no effect: nothing reads it" in note for note in plan.notes)
    assert plan.datasets[0].subsets[0].settings.custom_attributes == {"mood": "calm"}


def test_wrong_keys_do_not_hide_what_else_is_wrong(write):
    path = write("""
[[datasets]]
batch_sise = 2
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  keep_token = 1
  [[datasets.subsets]]
  metadata_file = "m.json"
""")
    told = [line.removeprefix(f"{path}: ") for line in faults(path)]
    assert told == [
        "unknown key datasets[0].batch_sise — did you mean 'batch_size'?",
        "unknown key datasets[1].subsets[0].keep_token — did you mean 'keep_tokens'?",
        "datasets[0] has no subsets — add a [[datasets.subsets]] table with image_dir below it",
        "datasets[1] mixes subsets with and without metadata_file — put them into datasets of their own",
    ]
