"""Which caption file belongs to which image, and what happens to images without one."""

from __future__ import annotations

import json

import pytest

from data.conftest import write_image, write_images
from data.dataset_files import (
    RESOLUTION,
    list_captions,
)
from sfumato.errors import UserError


def test_caption_files_with_another_extension_are_found_and_reported(find, tmp_path):
    write_images(tmp_path / "t" / "1_a", 3)
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION)  # the default extension is .caption
    assert list_captions(plan)["img2.png"] == "tag2, cat, 1_a"
    assert any("no .caption files; took the 3 .txt files" in note for note in plan.notes)
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION, "--caption_extension", "txt")
    assert not plan.notes


def test_the_configured_extension_takes_precedence(find, tmp_path):
    (first, *_) = write_images(tmp_path / "t" / "1_a", 2)
    first.with_suffix(".caption").write_text("configured")
    plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION)
    assert list_captions(plan) == {"img0.png": "configured", "img1.png": "a"}  # the other one gets the class tokens
    assert any("1 of 2 images have no caption" in note and "'a'" in note for note in plan.notes)


def test_face_crops_share_a_caption(find, tmp_path):
    (image,) = write_images(tmp_path / "t" / "1_a", 1)
    image.rename(image.with_name("my_face_10_20_30_40.png"))
    image.with_suffix(".txt").rename(image.with_name("my_face.txt"))
    assert list_captions(find("--train_data_dir", tmp_path / "t", *RESOLUTION)) == {
        "my_face_10_20_30_40.png": "tag0, cat, 1_a"
    }


@pytest.mark.parametrize("policy", ["error", "empty", "skip"])
def test_missing_captions(find, tmp_path, policy):
    first, second, _ = write_images(tmp_path / "a", 3)
    first.with_suffix(".txt").unlink()
    second.with_suffix(".txt").write_text(" \n")
    (tmp_path / "set.toml").write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path.as_posix()}/a'\n"
    )
    argv = ["--dataset_config", tmp_path / "set.toml", "--caption_extension", ".txt", "--on_missing_caption", policy]
    plan = find.attempt(*argv)
    what = "2 of 3 images have no caption (.txt file beside them), 1 of them an empty file"
    if policy == "error":
        (problem,) = find.problems.found
        assert problem.code == "captions-missing"
        assert what in problem.what
        assert "img0.png, img1.png" in problem.what
        assert "--on_missing_caption" in problem.fix
    else:
        find.problems.raise_all()
        assert any(what in note for note in plan.notes)
        rest = {"img2.png": "tag2, cat, a"}
        assert list_captions(plan) == (rest if policy == "skip" else {"img0.png": "", "img1.png": "", **rest})


def test_wildcards_take_all_lines(find, tmp_path):
    (image,) = write_images(tmp_path / "t" / "1_a", 1)
    image.with_suffix(".txt").write_text("one\n\n two \n")
    arguments = ("--train_data_dir", tmp_path / "t", *RESOLUTION)
    assert list_captions(find(*arguments)) == {"img0.png": "one"}
    assert list_captions(find(*arguments, "--enable_wildcard")) == {"img0.png": "one\ntwo"}


def test_captions_that_are_not_utf8_name_file_and_line(find, tmp_path):
    (image,) = write_images(tmp_path / "t" / "1_a", 1)
    image.with_suffix(".txt").write_bytes(b"fine\n" + "größe".encode("cp1252"))
    find.attempt("--train_data_dir", tmp_path / "t", *RESOLUTION)
    (problem,) = find.problems.found
    assert problem.code == "text-file-not-utf8"
    assert f"{image.with_suffix('.txt')}, line 2" in problem.what


def test_a_byte_order_mark_is_not_part_of_a_caption(find, tmp_path):
    (image,) = write_images(tmp_path / "t" / "1_a", 1)
    image.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa cat")
    assert list_captions(find("--train_data_dir", tmp_path / "t", *RESOLUTION)) == {"img0.png": "a cat"}


def test_json_captions_beside_images(find, tmp_path):
    contents = [{"caption": "a cat", "tags": ["x", "y"]}, "plain text", {"tags": "one, two", "id": 7}]
    for i, content in enumerate(contents):
        path = write_image(tmp_path / "a" / f"{i}.png")
        path.with_suffix(".json").write_text(json.dumps(content))
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\n"
    plan = find.toml(text)
    assert list_captions(plan) == {"0.png": "a cat,x, y", "1.png": "plain text", "2.png": "one, two"}
    assert any("took the 3 .json files" in note for note in plan.notes)
    for fault, code in (("[1]", "caption-file-no-caption"), ("{", "caption-file-invalid-json")):
        (tmp_path / "a" / "1.json").write_text(fault)
        with pytest.raises(UserError, match=r"1\.json"):
            find.toml(text)
        assert find.codes == [code]
