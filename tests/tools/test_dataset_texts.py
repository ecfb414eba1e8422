"""Metadata files: texts gathered in them, and cleaned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sfumato.cli.main import main
from sfumato.compat.launch import main as launch
from sfumato.tools.clean_texts import clean_caption, clean_tags


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("a.png", "b.jpg", "inner/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / name)
    (folder / "a.caption").write_text("a cat\non a chair\n")
    (folder / "b.jpg.caption").write_text(" a dog ")
    (folder / "inner" / "c.caption").write_text("a bird")
    (folder / "a.txt").write_text("cat, chair")
    return folder


def test_captions_and_tags_meet_in_one_file(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "meta.json"
    assert main(["dataset", "merge-captions", str(images), str(target), "--recursive"]) == 0
    assert main(["dataset", "merge-tags", str(images), str(target), "--recursive"]) == 0
    assert json.loads(target.read_text()) == {
        "a": {"caption": "a cat\non a chair", "tags": "cat, chair"},
        "b": {"caption": "a dog"},
        "c": {"caption": "a bird"},
    }
    assert "b.jpg" in capfd.readouterr().err


def test_the_scripts(images: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    key = str(images / "a.png")
    source.write_text(json.dumps({key: {"caption": "old", "train_resolution": [64, 64]}, "other": {"caption": "kept"}}))
    words = ["finetune/merge_captions_to_metadata.py", "--full_path", str(images), str(target)]
    assert launch([*words, "--in_json", str(source), "--caption_extention", ".caption"]) == 0
    entries = json.loads(target.read_text())
    assert entries[key] == {"caption": "a cat\non a chair", "train_resolution": [64, 64]}
    assert entries["other"] == {"caption": "kept"}
    assert json.loads(source.read_text())[key]["caption"] == "old"
    assert launch(["finetune/clean_captions_and_tags", str(target), str(target)]) == 0


def test_equal_names_need_paths(images: Path, tmp_path: Path, codes: list[str]) -> None:
    (images / "inner" / "c.png").rename(images / "inner" / "a.png")
    (images / "inner" / "c.caption").rename(images / "inner" / "a.caption")
    words = ["dataset", "merge-captions", str(images), str(tmp_path / "meta.json"), "--recursive"]
    assert main(words) == 2
    assert codes == ["metadata-names-equal"]
    assert not (tmp_path / "meta.json").exists()
    assert main([*words, "--full_path"]) == 0


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("long_hair, ^_^, red_eyes", "long hair, ^_^, red eyes"),
        ("1girl, solo, rating:safe, x", "1girl, solo"),
        ("1girl, red eyes, blue eyes", "1girl, red eyes, blue eyes"),
        ("2girls, red eyes, blue eyes, long hair", "2girls, long hair"),
        ("2boys, long hair, short hair, black hair", "2boys, black hair"),
        ("multiple girls, black hair, blonde hair, long hair", "multiple girls, long hair"),
        ("2girls, ponytail, twintails, hime cut", "2girls, hime cut"),
        ("2girls, short sleeves, sleeveless", "2girls"),
        ("shirt, white shirt, hair ornament", "white shirt, hair ornament"),
        ("shirt, shirt", "shirt"),
        ("", ""),
    ],
)
def test_clean_tags(tags: str, expected: str) -> None:
    assert clean_tags(tags) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a young woman and two women", "a girl and two girls"),
        ("an anime anime girl", "an girl"),
        ("a cartoon couple", "a couple"),
        ("a cat on a chair", "a cat on a chair"),
    ],
)
def test_clean_captions(caption: str, expected: str) -> None:
    assert clean_caption(caption) == expected
