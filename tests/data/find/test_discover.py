"""All faults at once, nothing written among the images, and the metadata of the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.conftest import write_image, write_images
from data.dataset_files import (
    RESOLUTION,
    SUBSET,
    hash_tree,
)
from sfumato.config import load_config
from sfumato.data.find.discover import find_data
from sfumato.data.ss_metadata import build_ss_metadata
from sfumato.errors import Problems, UserError

GOLDENS = Path(__file__).parents[2] / "goldens"


def test_faults_of_several_subsets_are_reported_at_once(find, tmp_path):
    """An unknown key, a missing folder, an empty one and a bad image, each in a subset of its own: all at once."""
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "bad" / "x.png", caption="x").write_bytes(b"")
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir = '{{root}}/{name}'\n" for name in ("gone", "empty", "bad"))
    text = f"[[datasets]]\nresolution = 64\n{subsets}[[datasets.subsets]]\nimage_dir = 'x'\nkeep_token = 1\n"
    with pytest.raises(UserError):
        find.toml(text)
    messages = dict(zip(find.codes, find.messages, strict=True))
    assert "gone" in messages["subset-folder-unreadable"]
    assert "empty" in messages["subset-without-images"]
    assert "x.png" in messages["image-file-empty"]
    assert any("datasets[0].subsets[3].keep_token" in message for message in messages.values())


def test_the_cache_folder_may_not_be_among_the_images(find, tmp_path):
    write_images(tmp_path / "t" / "1_a", 1)
    before = hash_tree(tmp_path / "t")
    find.attempt("--train_data_dir", tmp_path / "t", *RESOLUTION, "--cache_dir", tmp_path / "t" / "1_a" / "cache")
    assert find.codes[0] == "cache-dir-among-images"
    assert hash_tree(tmp_path / "t") == before


def test_images_are_not_changed(find, tmp_path):
    write_images(tmp_path / "t" / "1_a", 3)
    (tmp_path / "t" / "1_a" / ".ipynb_checkpoints").mkdir()
    before = hash_tree(tmp_path / "t")
    find("--train_data_dir", tmp_path / "t", *RESOLUTION)
    assert hash_tree(tmp_path / "t") == before


def test_metadata_has_the_recorded_keys(find, tmp_path):
    golden = json.loads((GOLDENS / "metadata_keys.json").read_text())
    write_images(tmp_path / "1_a", 2, size=(80, 64))
    write_images(tmp_path / "1_b", 1)
    first = "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 256\n"
    subsets = f"{SUBSET}1_a'\n{SUBSET}1_b'\nis_reg = true\n"
    with_file = build_ss_metadata(find.toml(f"{first}{subsets}[[datasets]]\nresolution = 128\n{SUBSET}1_a'\n"))
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
    flat = build_ss_metadata(find("--train_data_dir", tmp_path / "t", *RESOLUTION))
    assert only_without <= set(flat)
    assert flat["ss_bucket_info"] is None
    assert flat["ss_resolution"] == "(64, 64)"
    assert str(tmp_path) not in json.dumps(flat)


def test_the_default_cache_folder_is_used(find, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write_images(tmp_path / "t" / "1_a", 1)
    (tmp_path / "m.safetensors").touch()
    argv = ["--pretrained_model_name_or_path", "m.safetensors", "--output_dir", "o", "--resolution", "64"]
    monkeypatch.chdir(tmp_path)
    problems = Problems()
    find_data(load_config([*argv, "--train_data_dir", "t"]), bucket_step=8, problems=problems)
    problems.raise_all()
    assert list((tmp_path / "home" / "sfumato" / "folders").iterdir())


def test_a_subset_without_images_left_is_a_fault(find, tmp_path):
    for path in write_images(tmp_path / "a", 2):
        path.with_suffix(".txt").unlink()
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\n"
    with pytest.raises(UserError) as error:
        find.toml(text, "--on_missing_caption", "skip")
    assert error.value.code == "all-images-skipped"
    with pytest.raises(UserError) as error:
        find.toml(f"{text}class_tokens = 'a'\n".replace("64", "64\nskip_image_resolution = 64"))
    assert error.value.code == "no-training-images"
