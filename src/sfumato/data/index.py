"""What is remembered of a folder between runs: sizes of its images and texts of its caption files.

A line counts only while the file has the size and modification time that were remembered, so nothing can be stale.
The file lies in the cache folder, never among the pictures; losing it costs time only.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# Plain tuples, since there are millions: bytes and modification time in ns of the file, then what was read of it.
KnownImage = tuple[int, int, int, int]  # width and height as shown
KnownCaption = tuple[int, int, str]  # the whole text

VERSION = 1  # of the file's form, and of how sizes and captions are read
LINES = 10_000  # files in one line of the index: bounds the memory of reading it


def default_cache_dir() -> Path:
    """`sfumato` in the user's cache folder: %LOCALAPPDATA%, $XDG_CACHE_HOME or ~/.cache."""
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "sfumato"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato"


def index_path(cache_dir: Path, folder: str) -> Path:
    name = hashlib.blake2b(os.fsencode(folder), digest_size=16).hexdigest()
    return cache_dir / "folders" / f"{name}.jsonl"


def load_index(cache_dir: Path, folder: str) -> FolderIndex:
    """What is remembered of the folder; nothing where the file is missing, torn or of another version."""
    images: dict[str, KnownImage] = {}
    captions: dict[str, KnownCaption] = {}
    try:
        with index_path(cache_dir, folder).open(encoding="utf-8") as lines:
            if json.loads(next(lines, "null")) != head(folder):
                return FolderIndex({}, {})
            for line in lines:
                kind, names, columns = json.loads(line)
                known = images if kind == "images" else captions
                known.update(zip(names, zip(*columns, strict=True), strict=True))
    except (OSError, ValueError, TypeError):
        return FolderIndex({}, {})
    return FolderIndex(images, captions)


def save_index(cache_dir: Path, folder: str, index: FolderIndex) -> bool:
    """Write the index whole; False where the cache folder cannot be written."""
    lines = [json.dumps(head(folder), ensure_ascii=True)]
    for kind, known in (("images", index.images), ("captions", index.captions)):
        names = list(known)
        for start in range(0, len(names), LINES):
            some = names[start : start + LINES]
            columns = list(zip(*(known[name] for name in some), strict=True))
            lines.append(json.dumps([kind, some, columns], ensure_ascii=True))
    path = index_path(cache_dir, folder)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, path)  # not synced to disk: a torn index is not read, and costs only time
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def head(folder: str) -> dict[str, object]:
    return {"sfumato": "folder index", "version": VERSION, "folder": folder}


class FolderIndex(NamedTuple):
    """By file name."""

    images: Mapping[str, KnownImage]
    captions: Mapping[str, KnownCaption]
