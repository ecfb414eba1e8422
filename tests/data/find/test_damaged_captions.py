"""Captions and metadata that no one can mean: half letters, endless nesting, megabytes."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from sfumato.data.captions import MAX_CAPTION_BYTES
from sfumato.data.find.caption_files import parse_json_caption
from sfumato.data.find.folders import read_captions
from sfumato.data.find.index import Index
from sfumato.data.find.metadata_source import read_entries
from sfumato.data.find.settings import check_texts
from sfumato.data.find.tar_source import read_archive
from sfumato.errors import UserError


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('"a \\ud83d cat"', "caption-half-letter"),
        ('{"caption": "a", "tags": ["\\udc31"]}', "caption-half-letter"),
        ("[" * 100_000, "caption-file-invalid-json"),
        ("9" * 5000, "caption-file-invalid-json"),
        (json.dumps("x" * (MAX_CAPTION_BYTES + 1)), "caption-too-long"),
    ],
)
def test_captions_in_json(text: str, code: str) -> None:
    with pytest.raises(UserError) as error:
        parse_json_caption(text, "a.json", separator=",", several_lines=False)
    assert error.value.code == code
    assert "a.json" in error.value.what


def test_a_whole_letter_of_two_halves_is_a_letter() -> None:
    assert parse_json_caption('"\\ud83d\\udc31"', "a.json", separator=",", several_lines=False) == "\U0001f431"


@pytest.mark.parametrize("content", ['{"a.png": ' + "[" * 100_000, '{"a.png": ' + "9" * 5000, "{" * 100_000])
def test_metadata_without_end(tmp_path: Path, content: str) -> None:
    (tmp_path / "m.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        list(read_entries(tmp_path / "m.json"))
    assert error.value.code == "metadata-invalid-json"
    assert "line 1" in error.value.what


def test_a_line_of_metadata_without_end(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"image_path": "a"}\n' + "[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError) as error:
        list(read_entries(tmp_path / "m.jsonl"))
    assert error.value.code == "metadata-line-invalid-json"
    assert "line 2" in error.value.what


def test_a_caption_file_of_megabytes_is_its_own_fault(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * (MAX_CAPTION_BYTES + 1))
    (tmp_path / "b.txt").write_bytes(b"x" * MAX_CAPTION_BYTES)
    found = read_captions(str(tmp_path), ["a.txt", "b.txt"], Index(tmp_path / "cache", ("captions",)))
    assert {row: fault.code for row, fault in found.faults.items()} == {0: "caption-too-long"}
    assert len(found.texts[1]) == MAX_CAPTION_BYTES


def test_a_caption_of_megabytes_in_an_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("a.bmp", make_bmp()), ("a.txt", b"x" * (MAX_CAPTION_BYTES + 1))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    found = read_archive(str(tmp_path / "a.tar"), [".txt"])
    assert b"a caption at most" in found["faults block"].tobytes()


def make_bmp() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "BMP")
    return content.getvalue()


def test_class_tokens_that_are_not_utf8() -> None:
    """A folder whose name is in another encoding, or a word of the command line."""
    check_texts("x", {"class_tokens": "größe", "caption_prefix": None, "keep_tokens": 1})
    with pytest.raises(UserError) as error:
        check_texts("subsets[0]", {"caption_prefix": "gr\udcf6\udcdfe"})
    assert error.value.code == "caption-option-not-utf8"
    assert "subsets[0]: caption_prefix" in error.value.what


def test_an_index_that_lost_a_column_is_a_miss(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-8")
    index = Index(tmp_path / "cache", ("captions",))
    read_captions(str(tmp_path), ["a.txt"], index)
    assert index.load() is not None
    with zipfile.ZipFile(index.path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for lost in members:
        with zipfile.ZipFile(index.path, "w") as archive:
            for name, data in members.items():
                if name != lost:
                    archive.writestr(name, data)
        assert index.load() is None
        assert list(read_captions(str(tmp_path), ["a.txt"], index).texts) == ["a cat"]


def test_an_index_with_any_byte_changed_is_right_or_a_miss(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-8")
    index = Index(tmp_path / "cache", ("captions",))
    read_captions(str(tmp_path), ["a.txt"], index)
    whole = index.path.read_bytes()
    for place in range(0, len(whole), 5):
        index.path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        assert list(read_captions(str(tmp_path), ["a.txt"], index).texts) == ["a cat"]
