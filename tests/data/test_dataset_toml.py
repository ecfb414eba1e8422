"""The dataset file: what is accepted, which value counts, and how faults are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.config.dataset_toml import DATASET_KEYS, ONLY_SUBSET_KEYS, SUBSET_KEYS, DatasetFile, read_dataset_config
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


@pytest.mark.parametrize(
    ("line", "room"),
    [
        ("validation_split = 0.1", "validation"),
        ("custom_attributes = { diff_output_preservation = true }", "preservation"),
    ],
)
def test_what_is_still_to_come_is_refused_unless_it_is_off(write, line, room):
    path = write(LEAST + line)
    (told,) = faults(path)
    key = line.split()[0]
    assert told == f"{path}: datasets[0].subsets[0].{key} is not available yet (comes with {room}) — leave {key} out"
    if "true" in line and "{" not in line:
        assert read(write(LEAST + line.replace("true", "false")))


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
