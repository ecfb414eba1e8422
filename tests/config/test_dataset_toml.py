"""The dataset file: what is accepted, and how faults are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.config.dataset_toml import (
    DATASET_KEYS,
    ONLY_SUBSET_KEYS,
    SUBSET_KEYS,
    DatasetFile,
    read_dataset_config,
)
from sfumato.config.schema import vocabulary
from sfumato.errors import Problems, UserError

LEAST = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'images'\n"


def read(path: Path) -> DatasetFile:
    problems = Problems()
    file = read_dataset_config(path, problems)
    problems.raise_all()
    assert file is not None
    return file


def find_faults(path: Path) -> list[UserError]:
    problems = Problems()
    read_dataset_config(path, problems)
    assert problems.found
    return problems.found


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


def test_all_faults_are_reported_at_once_with_their_keys(write):
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
    texts = {str(error).removeprefix(f"{path}: ") for error in find_faults(path)}
    not_a_range = "is not a range; write two numbers, the smaller first, e.g. 2.0,4.0"
    assert texts == {
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
    first, second = find_faults(path)
    assert (first.code, second.code) == ("subset-folder-missing", "dataset-without-subsets")
    assert "datasets[0].subsets[0].image_dir" in first.what
    assert "datasets[1]" in second.what
    assert find_faults(write("[general]\n"))[0].code == "dataset-list-missing"


@pytest.mark.parametrize(
    ("content", "code", "value"),
    [
        (LEAST + "image_dir = 'b'\n", "dataset-file-invalid-toml", "given twice"),
        ("[general]\n[general]\n" + LEAST, "dataset-file-invalid-toml", "given twice"),
        (LEAST + 'class_tokens = "C:\\images"\n', "dataset-file-invalid-toml", "'single quotes'"),
        (LEAST.encode() + "class_tokens = 'größe'".encode("cp1252"), "text-file-not-utf8", "line 5"),
        ("subsets = [", "dataset-file-invalid-toml", "set.toml"),
        (LEAST + 'class_tokens = "D:\\sets\\Used"\n', "dataset-file-invalid-toml", "forward slashes"),
        (LEAST.replace("'images'", '"D:\\new\\train"'), "dataset-value-malformed", "forward slashes"),
        (LEAST.replace("'images'", '"sets\\bright"'), "dataset-value-malformed", "'single quotes'"),
    ],
)
def test_unreadable_files(write, content, code, value):
    (error,) = find_faults(write(content))
    assert error.code == code
    assert value in str(error)


def test_other_kinds_of_files(write, tmp_path):
    paths = {
        "dataset-file-suffix": write("a: 1", "set.yaml"),
        "dataset-json-key-twice": write('{"datasets": [], "datasets": []}', "twice.json"),
        "dataset-file-no-object": write("[1]", "list.json"),
        "dataset-file-invalid-json": write("[1", "broken.json"),
        "dataset-json-half-letter": write('{"datasets": [], "a\\ud83d": 1}', "half.json"),
        "dataset-file-unreadable": tmp_path / "none.toml",
    }
    assert "forward slashes" in find_faults(write('{"datasets": "D:\\sets"}', "path.json"))[0].fix
    for code, path in paths.items():
        (error,) = find_faults(path)
        assert error.code == code
        assert str(path) in error.what


def test_single_letter_slips_are_recognized(write):
    """Every known key with its last letter missing is reported as unknown, with the right spelling."""
    for key in {**DATASET_KEYS, **SUBSET_KEYS, **ONLY_SUBSET_KEYS}:
        level = LEAST.replace("resolution = 512\n", "") if key in DATASET_KEYS else LEAST
        text = f"[[datasets]]\n{key[:-1]} = 1\n" if key in DATASET_KEYS else f"{level}{key[:-1]} = 1\n"
        assert any(f"did you mean '{key}'?" in error.fix for error in find_faults(write(text))), key


def test_keys_are_options_of_the_vocabulary():
    for keys in (DATASET_KEYS, SUBSET_KEYS, ONLY_SUBSET_KEYS):
        assert not {option for option in keys.values() if option not in vocabulary()}


@pytest.mark.parametrize("key", DATASET_KEYS)
def test_dataset_keys_are_refused_in_subsets(write, key):
    """They decide about batches, which subsets share."""
    (error,) = find_faults(write(f"{LEAST}{key} = 512\n"))
    assert error.code == "dataset-key-unknown"
    assert str(error).endswith(f"datasets[0].subsets[0].{key} — it belongs in [general] or [[datasets]]")


@pytest.mark.parametrize("key", [*ONLY_SUBSET_KEYS, "image_dir", "is_reg"])
def test_keys_of_one_source_are_refused_above_it(write, key):
    (error,) = find_faults(write(f"[general]\n{key} = 1\n{LEAST}"))
    assert error.code == "dataset-key-unknown"
    assert str(error).endswith(f"general.{key} — it belongs in [[datasets.subsets]]")


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ("metadata_file = 'm.json'\ncaption_extension = '.txt'", "subset-key-with-metadata"),
        ("is_reg = true\nconditioning_data_dir = 'm'", "subset-conditioning-for-regularization"),
        ("custom_attributes = { diff_output_preservation = 'yes' }", "subset-preservation-not-boolean"),
        ("custom_attributes = { timestep_sampling = 0.5 }", "subset-timestep-offset-invalid"),
        ("custom_attributes = { timestep_sampling = { ofset = 0.5 } }", "subset-timestep-offset-invalid"),
        ("custom_attributes = { timestep_sampling = { offset = true } }", "subset-timestep-offset-invalid"),
        ("custom_attributes = { timestep_sampling = { offset = 50 } }", "subset-timestep-offset-invalid"),
    ],
)
def test_contradictions_inside_a_subset(write, lines, code):
    errors = find_faults(write(f"{LEAST}{lines}\nkeep_token = 1\n"))
    assert {error.code for error in errors} == {"dataset-key-unknown", code}


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
    assert [error.code for error in find_faults(path)] == [
        "dataset-key-unknown",
        "dataset-key-unknown",
        "dataset-without-subsets",
        "subsets-mix-metadata",
    ]
