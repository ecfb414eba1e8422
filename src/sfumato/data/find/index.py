"""The dataset index: sizes and caption texts of a folder or an archive, stored between runs in columns.

An entry is used only while its file has the stored size and modification time, so it is never stale. The files are in
the cache folder, never among the images; deleting one costs time only.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.common.files import check_writable, open_file
from sfumato.config import Config
from sfumato.data.find.image_table import TextColumn
from sfumato.errors import UserError

INDEX_VERSION = 6  # of the file format, and of how sizes and captions are read
LOAD_ERRORS = (  # what numpy and zipfile raise on damaged files, collected by damaging some 20,000
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    UserError,  # of a special file
)

Columns = dict[str, NDArray[Any]]


def get_default_cache_dir() -> Path:
    """`sfumato` in the user's cache folder: %LOCALAPPDATA%, $XDG_CACHE_HOME or ~/.cache."""
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "sfumato"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato"


def cache_folder(config: Config) -> Path:
    """Where a run's caches and dataset index are."""
    return config.cache.cache_dir or get_default_cache_dir()


def check_cache_folder(config: Config) -> None:
    """A cache on disk that does not exist yet must be one that can be made; one that exists may be complete."""
    on_disk = config.cache.cache_latents_to_disk or config.cache.cache_text_encoder_outputs_to_disk
    if on_disk and not cache_folder(config).is_dir():
        check_writable(cache_folder(config), option="--cache_dir")


class Index(NamedTuple):
    """The index file of one folder or archive."""

    cache_dir: Path
    key: tuple[str, ...]  # kind of table, folder or archive, and whatever else distinguishes tables
    writable: bool = True

    @property
    def path(self) -> Path:
        name = hashlib.blake2b("\0".join(self.key).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return self.cache_dir / "folders" / f"{name}.npz"

    def load(self) -> Columns | None:
        """The stored columns; None where there are none, or where the file is damaged or of another version."""
        try:
            with open_file(self.path) as opened, np.load(opened, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
                head = columns.pop("head").tobytes()
                return columns if head == self._make_head(columns) else None
        except LOAD_ERRORS:
            return None

    def save(self, columns: Mapping[str, NDArray[Any]]) -> bool:
        """Write the file and replace the old one, if it may be; False where the cache folder cannot be written."""
        if not self.writable:
            return True
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                head = np.frombuffer(self._make_head(columns), np.uint8)
                np.savez(file, **{"head": head, **columns})
            os.replace(temporary, self.path)  # not synced to disk: a torn file is not read, and costs only time
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            return False
        return True

    def _make_head(self, columns: Mapping[str, NDArray[Any]]) -> bytes:
        """With the columns' names, so that a file that lost one is no index. The archive checks their contents."""
        return json.dumps(["sfumato folder index", INDEX_VERSION, *self.key, sorted(columns)]).encode()


def pack_texts(name: str, texts: TextColumn) -> Columns:
    """A text column as two arrays."""
    return {f"{name} block": np.frombuffer(texts.block, np.uint8), f"{name} ends": texts.ends}


def unpack_texts(name: str, columns: Columns) -> TextColumn:
    return TextColumn(columns[f"{name} block"], columns[f"{name} ends"])
