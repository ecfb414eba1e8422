"""What is on the disk before a file or folder has its name: else a power failure could leave an empty one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sfumato.common.files import write_bytes, write_folder_atomically

pytestmark = pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced there")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """In order: the inode of whatever is synced, and "renamed"."""
    found: list[int | str] = []

    def watched(rename: Callable[..., None]) -> Callable[..., None]:
        def act(source: Path, target: Path) -> None:
            rename(source, target)
            found.append("renamed")

        return act

    monkeypatch.setattr(os, "fsync", lambda descriptor: found.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(os, "rename", watched(os.rename))
    return found


def test_a_file(tmp_path: Path, events: list[int | str]) -> None:
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert events == [(tmp_path / "a").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_a_folder(tmp_path: Path, events: list[int | str]) -> None:
    with write_folder_atomically(tmp_path / "a") as temporary:
        (temporary / "b").write_bytes(b"new")
        assert not events
    inside = {path.stat().st_ino for path in (tmp_path / "a", tmp_path / "a" / "b")}
    assert {*events[:2]} == inside
    assert events[2:] == ["renamed", tmp_path.stat().st_ino]
