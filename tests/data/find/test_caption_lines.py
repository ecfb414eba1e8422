"""Captions of several lines, in other encodings, and in what is no file."""

from __future__ import annotations

import json
import os
import tarfile

import pytest

from data.conftest import write_images
from data.dataset_files import RESOLUTION, list_captions

PARAGRAPHS = "A photograph.\r\n\r\nThe box is red.\n\nThe light is soft.\n"


def list_line_notes(plan) -> list[str]:
    return [note for note in plan.notes if "several lines" in note]


@pytest.mark.parametrize("source", ["folder", "archive", "metadata", "json"])
def test_unused_lines_are_counted_in_every_source(find, tmp_path, source):
    images = write_images(tmp_path / "t" / "1_a", 3)
    for image in images[:2]:
        image.with_suffix(".txt").write_text(PARAGRAPHS)
    images[2].with_suffix(".txt").write_text("\n \none line\n\n")
    argv = ["--train_data_dir", tmp_path / "t"]
    if source == "archive":
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            archive.add(tmp_path / "t", "")
        toml = (
            f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'set.tar').as_posix()}'\n"
        )
        (tmp_path / "set.toml").write_text(toml)
        argv = ["--dataset_config", tmp_path / "set.toml"]
    elif source == "metadata":
        content = {image.stem: {"caption": image.with_suffix(".txt").read_text()} for image in images}
        (tmp_path / "m.json").write_text(json.dumps(content))
        argv = ["--in_json", tmp_path / "m.json", "--train_data_dir", tmp_path / "t" / "1_a"]
    elif source == "json":
        for image in images:
            text = image.with_suffix(".txt")
            image.with_suffix(".json").write_text(json.dumps({"caption": text.read_text()}))
            text.unlink()
        argv += ["--caption_extension", ".json"]
    argv += [] if source == "archive" else RESOLUTION
    for _ in range(2):  # the second time from the index
        plan = find(*argv)
        assert sorted(list_captions(plan).values()) == ["A photograph.", "A photograph.", "one line"]
        (note,) = list_line_notes(plan)
        assert "2 of 3 captions" in note
        assert "img0" in note
        assert "img1" in note
    assert not list_line_notes(find(*argv, "--enable_wildcard"))


def test_captions_in_utf16_are_captions(find, tmp_path):
    for image, encoding in zip(
        write_images(tmp_path / "t" / "1_a", 3), ("utf-16", "utf-16-le", "utf-16-be"), strict=True
    ):
        image.with_suffix(".txt").write_bytes("größe, a cat".encode(encoding))
    for _ in range(2):
        plan = find("--train_data_dir", tmp_path / "t", *RESOLUTION, "--caption_extension", ".txt")
        assert set(list_captions(plan).values()) == {"größe, a cat"}


def test_a_damaged_caption_is_named_each_time(find, tmp_path):
    first, *_ = write_images(tmp_path / "t" / "1_a", 2)
    first.with_suffix(".txt").write_bytes(bytes(20))
    for _ in range(2):
        find.attempt("--train_data_dir", tmp_path / "t", *RESOLUTION)
        assert find.codes == ["text-file-with-nul"]
        assert str(first.with_suffix(".txt")) in find.messages[0]


@pytest.mark.skipif(os.name == "nt", reason="such files do not exist there")
@pytest.mark.parametrize("name", ["img0.txt", "img0.png", "zz.png"])
def test_named_pipes_among_the_data_are_named(find, tmp_path, name):
    first, *_ = write_images(tmp_path / "t" / "1_a", 2)
    first.with_name(name).unlink(missing_ok=True)
    os.mkfifo(first.with_name(name))
    find.attempt("--train_data_dir", tmp_path / "t", *RESOLUTION)
    assert find.codes == ["file-is-special"]
    assert str(first.with_name(name)) in find.messages[0]


@pytest.mark.skipif(os.name == "nt", reason="such files do not exist there")
def test_a_named_pipe_as_metadata_is_named(find, tmp_path):
    write_images(tmp_path / "a", 1)
    os.mkfifo(tmp_path / "m.json")
    text = (
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\nmetadata_file = '{root}/m.json'\n"
    )
    (tmp_path / "set.toml").write_text(text.replace("{root}", tmp_path.as_posix()))
    find.attempt("--dataset_config", tmp_path / "set.toml")
    assert find.codes == ["file-is-special"]
