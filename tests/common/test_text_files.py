"""Text files of users: their encodings, and what is no file."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.common.files import open_file, open_unbuffered, read_file, refuse_special_file, write_text
from sfumato.common.text_files import decode_text, read_text_file
from sfumato.errors import UserError

TEXT = "größe, 赤い箱 🎨\r\nsecond line"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_a_mark_names_is_read(encoding):
    assert decode_text(TEXT.encode(encoding), "a.txt") == TEXT


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("width", [16, 32])
def test_both_byte_orders_are_read(order, width):
    assert decode_text(f"\ufeff{TEXT}".encode(f"utf-{width}-{order}"), "a.txt") == TEXT


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("text", ["a cat, größe\r\n", "x", "1girl, 赤い箱, solo, long hair"])
def test_utf16_without_a_mark_is_read_where_the_letters_are_latin(order, text):
    assert decode_text(text.encode(f"utf-16-{order}"), "a.txt") == text


@given(st.text(st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"])))
def test_utf8_is_never_taken_for_something_else(text):
    assert decode_text(text.encode(), "a.txt") == text


@pytest.mark.parametrize(
    ("data", "code", "line", "words"),
    [
        ("fine\ncafé".encode("latin-1"), "text-file-not-utf8", 2, "'é'"),
        ("“fine” – größe".encode("cp1252"), "text-file-not-utf8", 1, "Windows-1252"),
        ("赤い箱, 円".encode("cp932"), "text-file-not-utf8", 1, "is not UTF-8"),
        ("привет мир".encode("cp1251"), "text-file-not-utf8", 1, "is not UTF-8"),
        ("赤い箱を持つ人, 円".encode("utf-16-le"), "text-file-not-utf8", 1, "UTF-16 without a byte order mark"),
        ("\ufeffa cat".encode("utf-16-le")[:-1], "text-file-not-utf8", 1, "cut short"),
        (b"a cat\n\0and a dog", "text-file-with-nul", 2, "NUL"),
        (b"a cat\0", "text-file-with-nul", 1, "NUL"),
        (bytes(64), "text-file-with-nul", 1, "damaged"),
        ("\ufeffa\0b".encode("utf-16-be"), "text-file-with-nul", 1, "NUL"),
    ],
)
def test_other_texts_are_named_with_their_line(data, code, line, words):
    with pytest.raises(UserError) as error:
        decode_text(data, "images/a.txt")
    assert error.value.code == code
    assert error.value.what.startswith(f"images/a.txt, line {line}, ")
    assert words in str(error.value)
    assert "UTF-8" in error.value.fix


def test_file_names_that_are_not_utf8_are_written_as_in_json(tmp_path):
    write_text(tmp_path / "a.json", '"größe \udcff"')
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == "größe \udcff"


@pytest.mark.skipif(os.name == "nt", reason="such files do not exist there")
def test_pipes_sockets_and_devices_are_no_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        server.bind("socket")
        for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "socket", Path("/dev/zero")):
            with pytest.raises(UserError) as error:
                read_text_file(path)
            assert error.value.code == "file-is-special"
            assert str(path) in error.value.what
    (tmp_path / "file").write_bytes(b"x")
    assert read_file(tmp_path / "file") == b"x"
    refuse_special_file(tmp_path)
    refuse_special_file(tmp_path / "none")


@pytest.mark.skipif(os.name == "nt", reason="such files do not exist there")
def test_files_without_a_size_are_no_files():
    """/proc says 0 bytes of everything, also of what never ends."""
    with pytest.raises(UserError) as error:
        read_file("/proc/self/status")
    assert error.value.code == "file-without-size"


def test_the_door_tells_folders_missing_files_and_impossible_names(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")
    with pytest.raises(OSError, match="NUL"):
        read_file(str(tmp_path / "a") + "\0b")
    (tmp_path / "file").write_bytes(b"abc")
    with open_unbuffered(tmp_path / "file") as file:
        assert file.name == tmp_path / "file"
        assert file.read() == b"abc"
    with open_file(tmp_path / "file") as buffered:
        assert buffered.read(2) == b"ab"


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate((4 << 30) + 1)  # a hole: it takes no space
    with pytest.raises(UserError) as error:
        read_file(tmp_path / "large")
    assert error.value.code == "file-too-large"
