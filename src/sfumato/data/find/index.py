"""What is remembered of a folder or an archive between runs: sizes of images and texts of caption files, in columns.

An entry counts only while its file has the size and modification time that were remembered, so nothing can be stale.
The files lie in the cache folder, never among the pictures; losing one costs time only.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.data.find.image_table import Texts

VERSION = 3  # of the file's form, and of how sizes and captions are read
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)

Columns = dict[str, NDArray[Any]]


def default_cache_dir() -> Path:
    """`sfumato` in the user's cache folder: %LOCALAPPDATA%, $XDG_CACHE_HOME or ~/.cache."""
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "sfumato"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato"


class Index(NamedTuple):
    """Where one table of columns is remembered."""

    cache_dir: Path
    about: tuple[str, ...]  # kind of table, folder or archive, and what else tells tables apart

    @property
    def path(self) -> Path:
        name = hashlib.blake2b("\0".join(self.about).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return self.cache_dir / "folders" / f"{name}.npz"

    def load(self) -> Columns | None:
        """None where nothing is remembered, or where the file is damaged or of another version."""
        try:
            with self.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
                return columns if columns.pop("head").tobytes() == self._head() else None
        except DAMAGED:
            return None

    def save(self, columns: Mapping[str, NDArray[Any]]) -> bool:
        """Write the table whole; False where the cache folder cannot be written."""
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **{"head": np.frombuffer(self._head(), np.uint8), **columns})
            os.replace(temporary, self.path)  # not synced to disk: what is torn is not read, and costs only time
        except OSError:
            temporary.unlink(missing_ok=True)
            return False
        return True

    def _head(self) -> bytes:
        return json.dumps(["sfumato folder index", VERSION, *self.about]).encode()


def packed(name: str, texts: Texts) -> Columns:
    """Two columns that hold texts."""
    return {f"{name} block": np.frombuffer(texts.block, np.uint8), f"{name} ends": texts.ends}


def unpacked(name: str, columns: Columns) -> Texts:
    return Texts(columns[f"{name} block"], columns[f"{name} ends"])
