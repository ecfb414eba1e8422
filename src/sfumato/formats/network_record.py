"""What a cache folder keeps of the networks whose outputs it holds: enough to go on where their files are not."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sfumato.common import files
from sfumato.common.json_toml import decode_json
from sfumato.common.text import format_bytes
from sfumato.errors import UserError
from sfumato.formats.checkpoint_writer import TensorSpec, write_header_only
from sfumato.formats.header import read_header

RECORD_KEY = "sfumato.network_record"  # metadata of a header without tensors that stands for a network
ID_LETTERS = 12  # of the fingerprint, by which users name a record
_NETWORKS, _HEADER, _CONFIG, _TOKENIZER = "networks", "model.safetensors", "config.json", "tokenizer"


@dataclass(frozen=True, kw_only=True)
class NetworkRecord:
    """A network that has filled a cache: what its entries are known by, and the file that it was read from."""

    family: str
    part: str
    fingerprint: str  # of the weights as they were loaded, without later changes
    dtype: str  # of these weights: "bfloat16"
    file: str  # name, with its folder's; never a path
    size: int  # bytes
    modified: float  # Unix time
    folder: Path = Path()  # of the record itself

    @property
    def id(self) -> str:
        return self.fingerprint[:ID_LETTERS]

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the encoder's tokenizer; None for a network without."""
        folder = self.folder / _TOKENIZER
        return folder if folder.is_dir() else None

    def __str__(self) -> str:
        day = time.strftime("%Y-%m-%d", time.localtime(self.modified))
        return f"{self.id}: {self.file}, {format_bytes(self.size)}, of {day}, in {self.dtype}"

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], folder: Path) -> Self | None:
        """None where the metadata is not that of a record."""
        try:
            content = decode_json(metadata[RECORD_KEY])
            return cls(**content, folder=folder)
        except (KeyError, TypeError, ValueError):
            return None


def has_network_record(cache: Path, record: NetworkRecord) -> bool:
    return (_make_folder(cache, record) / _HEADER).is_file()


def write_network_record(
    cache: Path,
    record: NetworkRecord,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    save_tokenizer: Callable[[Path], None] | None,
) -> None:
    """A folder like that of a network in diffusers' layout, whose weight file is a header alone; complete or not there.

    specs: the tensors of the network. save_tokenizer: writes the encoder's tokenizer into a folder. Where several
    processes write the same, the first one's stays.
    """
    folder = _make_folder(cache, record)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    content = {name: value for name, value in asdict(record).items() if name != "folder"}
    try:
        temporary.mkdir(parents=True)
        files.write_text(temporary / _CONFIG, json.dumps(dict(config), indent=2))
        if save_tokenizer is not None:
            save_tokenizer(temporary / _TOKENIZER)
        write_header_only(temporary / _HEADER, specs, {RECORD_KEY: json.dumps(content)})
        with suppress(OSError):  # another process was faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_network_records(cache: Path) -> Iterator[NetworkRecord]:
    """Every record of a cache folder, in the order of their names; damaged ones are skipped."""
    for path in sorted((cache / _NETWORKS).glob(f"[!.]*/{_HEADER}")):
        try:
            record = NetworkRecord.from_metadata(read_header(path).metadata, path.parent)
        except (OSError, UserError):
            continue
        if record is not None:
            yield record


def _make_folder(cache: Path, record: NetworkRecord) -> Path:
    return cache / _NETWORKS / f"{record.part}-{record.fingerprint[: 2 * ID_LETTERS]}"
