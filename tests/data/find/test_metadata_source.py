"""Images that a metadata file or a dataset class names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.conftest import write_image, write_images
from data.dataset_files import (
    DATASET_CLASSES,
    RESOLUTION,
    list_captions,
    list_items,
    write_metadata,
)
from sfumato.data.find.metadata_source import read_entries
from sfumato.errors import UserError


@pytest.mark.parametrize("extension", [".json", ".jsonl"])
def test_a_metadata_file_names_images_and_captions(find, tmp_path, extension):
    write_images(tmp_path / "a", 4)
    write_image(tmp_path / "a" / "deep" / "x.png", caption=None)
    write_images(tmp_path / "elsewhere", 1, seed=3)
    entries = {
        "img0.png": {"caption": "a cat", "tags": "red, blue", "image_size": [1, 1], "train_resolution": [64, 64]},
        "img1": {"tags": "only tags"},  # what sd-scripts' merging tools write
        str(tmp_path / "a" / "img2.png"): {"caption": "whole path"},
        "deep/x.png": {"caption": "below"},
        str(tmp_path / "elsewhere" / "img0"): {"caption": "größe 猫"},
    }
    file = write_metadata(tmp_path / f"meta{extension}", entries)
    plan = find("--in_json", file, "--train_data_dir", tmp_path / "a", *RESOLUTION, "--dataset_repeats", 3)
    assert [item.image.caption for item in list_items(plan)] == [
        "a cat,red, blue", "only tags", "whole path", "below", "größe 猫",
    ]  # fmt: skip
    assert [Path(item.image.path) for item in list_items(plan)] == [
        tmp_path / name for name in ("a/img0.png", "a/img1.png", "a/img2.png", "a/deep/x.png", "elsewhere/img0.png")
    ]
    assert {item.size for item in list_items(plan)} == {(64, 64)}  # from the files, whatever the metadata says
    assert plan.num_train_images == 15


def test_paths_may_lead_out_of_the_folder(find, tmp_path):
    write_images(tmp_path / "a", 1)
    write_images(tmp_path / "b", 1)
    entries = {"../b/img0.png": {"caption": "out"}, "./img0.png": {"caption": "in"}}
    plan = find(
        "--in_json", write_metadata(tmp_path / "m.json", entries), "--train_data_dir", tmp_path / "a", *RESOLUTION
    )
    assert [Path(item.image.path).parent.name for item in list_items(plan)] == ["b", "a"]


def test_without_a_folder_paths_are_absolute_or_from_here(find, tmp_path, monkeypatch):
    write_images(tmp_path / "a", 2)
    file = write_metadata(
        tmp_path / "m.json", {"a/img0.png": {"caption": "x"}, str(tmp_path / "a/img1.png"): {"caption": "y"}}
    )
    monkeypatch.chdir(tmp_path)
    assert list_captions(find("--in_json", file, *RESOLUTION)) == {"img0.png": "x", "img1.png": "y"}


@pytest.mark.parametrize(
    ("fields", "one", "several"),
    [
        ({"caption": "first\nsecond", "tags": "a, b"}, "first", "first,a, b\nsecond,a, b"),
        ({"caption": " \n one \n\n two", "tags": ""}, "one", "one\ntwo"),
        ({"tags": "a\nb"}, "a", "a,b"),
        ({"caption": "c", "tags": "a\nb"}, "c,a", "c,a,b"),
        ({"caption": "c", "tags": ["a", "b"]}, "c,a, b", "c,a, b"),
    ],
)
def test_captions_of_several_lines_and_tags(find, tmp_path, fields, one, several):
    write_images(tmp_path / "a", 1)
    arguments = (
        "--in_json",
        write_metadata(tmp_path / "m.json", {"img0.png": fields}),
        "--train_data_dir",
        tmp_path / "a",
    )
    plain = find(*arguments, *RESOLUTION, "--on_missing_caption", "empty")
    assert list_captions(plain)["img0.png"] == one
    assert list_captions(find(*arguments, *RESOLUTION, "--enable_wildcard"))["img0.png"] == several


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("[]", "metadata-not-an-object", ""),
        ("{}", "metadata-without-images", ""),
        ('{"a": {"caption": "x"}\n"b": {}}', "metadata-invalid-json", "line 2"),
        ('{"a": {"caption": "x"},\n\n "b": {"caption": }}', "metadata-invalid-json", "line 3"),
        ('{"a": 3}', "metadata-entry-not-object", "a is 3"),
        ('{"img0.png": {"caption": 3}}', "caption-field-wrong-type", "img0.png: caption is 3"),
        ('{"img0.png": {"caption": "größe"}}'.encode("cp1252"), "text-file-not-utf8", "line 1"),
        ('{"gone.png": {"caption": "x"}, "img0.png": {"caption": "y"}}', "metadata-images-missing", "1 of 2"),
        ('{"img0.png": {}, "img1.png": {"caption": "y"}}', "captions-missing", "1 of 2"),
    ],
)
def test_faults_of_a_metadata_file(find, tmp_path, text, code, words):
    write_images(tmp_path / "a", 2)
    file = tmp_path / "m.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    find.attempt("--in_json", file, "--train_data_dir", tmp_path / "a", *RESOLUTION)
    problem = next(problem for problem in find.problems.found if problem.code == code)
    assert words in problem.what
    assert "m.json" in problem.what


@pytest.mark.parametrize(
    ("line", "code"), [("{", "metadata-line-invalid-json"), ('{"caption": "x"}', "metadata-line-without-image")]
)
def test_faults_of_json_lines_name_the_line(find, tmp_path, line, code):
    write_images(tmp_path / "a", 1)
    file = tmp_path / "m.jsonl"
    file.write_text('{"image_path": "img0.png", "caption": "x"}\n' + line + "\n")
    find.attempt("--in_json", file, "--train_data_dir", tmp_path / "a", *RESOLUTION)
    (problem,) = (problem for problem in find.problems.found if problem.code == code)
    assert "m.jsonl, line 2" in problem.what


WORDS = st.text(max_size=5)


VALUES = st.none() | st.booleans() | st.integers() | WORDS | st.dictionaries(WORDS, WORDS, max_size=2)


@given(st.dictionaries(WORDS, st.dictionaries(WORDS, VALUES, max_size=3)), st.sampled_from([None, 1, "\t"]))
def test_a_large_object_is_read_member_by_member_as_json_reads_it(tmp_path_factory, content, indent):
    file = tmp_path_factory.mktemp("json") / "m.json"
    file.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    assert {key: fields for _, key, fields in read_entries(file)} == content


def test_metadata_and_folders_in_datasets_of_their_own(find, tmp_path):
    write_images(tmp_path / "a", 2)
    write_metadata(tmp_path / "m.json", {"img0.png": {"caption": "x"}})
    subsets = "[[datasets.subsets]]\nmetadata_file = '{root}/m.json'\nimage_dir = '{root}/a'\n"
    text = f"[general]\nresolution = 64\n[[datasets]]\n{subsets}"
    text += "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{root}/a'\n"
    first, second = find.toml(text).datasets
    assert (len(first.subsets[0].items), len(second.subsets[0].items)) == (1, 2)
    with pytest.raises(UserError, match=r"dataset\.toml.*metadata_file"):
        find.toml(text.replace("[[datasets]]\n[[datasets.subsets]]\nimage_dir", "[[datasets.subsets]]\nimage_dir"))
    twice = find.toml(f"[[datasets]]\nresolution = 64\n{subsets}{subsets}")
    assert len(twice.datasets[0].subsets) == 1
    assert any("m.json a second time" in note for note in twice.notes)


def test_cache_info_reads_the_metadata_that_sd_scripts_cached(find, tmp_path):
    write_images(tmp_path / "t" / "1_a", 2)
    argv = ("--train_data_dir", tmp_path / "t", *RESOLUTION, "--cache_info")
    plan = find(*argv)
    assert any("cache_info has no effect" in note for note in plan.notes)
    known = {"old/place/img1.png": {"caption": "remembered", "resolution": [64, 64]}}
    write_metadata(tmp_path / "t" / "1_a" / "metadata_cache.json", known)
    assert list_captions(find(*argv)) == {"img1.png": "remembered"}


def test_a_dataset_class_yields_the_images(find, tmp_path, monkeypatch):
    write_images(tmp_path / "a", 3)
    (tmp_path / "my_cats.py").write_text(DATASET_CLASSES)
    monkeypatch.chdir(tmp_path)
    plan = find("--dataset_class", "my_cats.Cats", *RESOLUTION, "--dataset_repeats", 2)
    assert list_captions(plan)["img2.png"] == "cat 2 at (64, 64)"
    assert plan.num_train_images == 6


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("Old", "dataset-class-unknown-argument", "tokenizer"),
        ("Odd", "dataset-class-bad-sample", "sample 0 is {'picture': 'x'}"),
        ("no_class", "dataset-class-not-iterable", "wrong_cats.no_class"),
        ("None", "dataset-class-not-found", "wrong_cats.None"),
    ],
)
def test_faults_of_a_dataset_class(find, tmp_path, monkeypatch, name, code, words):
    (tmp_path / "wrong_cats.py").write_text(DATASET_CLASSES)
    monkeypatch.chdir(tmp_path)
    find.attempt("--dataset_class", f"wrong_cats.{name}", *RESOLUTION)
    problem = next(problem for problem in find.problems.found if problem.code == code)
    assert words in problem.what
