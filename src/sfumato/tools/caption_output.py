"""Where texts about images go: a caption file beside each, or one metadata file for all. Nothing is half-written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sfumato.common.files import check_file_writable, check_writable, remove_leftovers, write_quickly, write_text
from sfumato.common.json_toml import decode_json
from sfumato.common.text_files import read_text_file
from sfumato.errors import UserError
from sfumato.tools.image_batches import Content, ImageReader, ReadImage, report_unreadable
from sfumato.track.progress_task import ProgressTask

JSON_LINES = ".jsonl"


DEFAULT_WORKERS = 4  # threads that decode images


class CaptionOutput(Protocol):
    """Takes one text per image; `close` after the last one, or after an interruption, keeps all that were given."""

    def check(self, images: Sequence[Path]) -> None:
        """UserError where nothing can be written."""
        ...

    def read(self, image: Path) -> str | None:
        """What is there already for an image; None where there is nothing."""
        ...

    def write(self, image: Path, text: str, size: tuple[int, int]) -> None: ...

    def close(self) -> None: ...


def write_texts(
    images: Sequence[Path],
    output: CaptionOutput,
    reader: ImageReader[Content],
    write_batch: Callable[[Sequence[ReadImage[Content]]], None],
    *,
    skip_existing: bool,
    label: str,
    missing: str,
) -> int:
    """Read images in batches and write a text for each; gives how many could not be read.

    What is written is kept whatever ends it. skip_existing: leave images alone that have a text. label: of the progress
    bar. missing: what unreadable images are told to lack.
    """
    output.check(images)
    if skip_existing:
        images = [image for image in images if output.read(image) is None]
    done = 0
    with closing(output), ProgressTask(label, "images") as progress:
        for count, batch in reader.read_batches(images):
            if batch:
                write_batch(batch)
            done += count
            progress(done, len(images))
    report_unreadable(reader.faults, missing)
    return len(reader.faults)


@dataclass(frozen=True, kw_only=True)
class FilesBeside:
    """A file with the name of its image and another extension, beside it."""

    extension: str

    def check(self, images: Sequence[Path]) -> None:
        for folder in dict.fromkeys(image.parent for image in images):
            check_writable(folder, option="--train_data_dir")
            remove_leftovers(folder, rf".*{self.extension.replace('.', '[.]')}")

    def read(self, image: Path) -> str | None:
        path = image.with_suffix(self.extension)
        try:
            return read_text_file(path).strip() if path.exists() else None
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror})", code="caption-unreadable", fix="check who may read it"
            ) from error

    def write(self, image: Path, text: str, size: tuple[int, int]) -> None:
        """Unlike a checkpoint it is not synced: a thousand are quickly made again."""
        write_quickly(image.with_suffix(self.extension), f"{text}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        pass


@dataclass(kw_only=True)
class MetadataFile:
    """One file with an entry for each image: a JSON object by path, or JSON lines. name: of the text in an entry.

    What the file has already stays, unless an image is written again.
    """

    path: Path
    name: str
    entries: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def check(self, images: Sequence[Path]) -> None:
        check_file_writable(self.path, option="--output_path")
        if self.path.exists():
            self.entries = read_metadata_entries(self.path)

    def read(self, image: Path) -> str | None:
        text = self.entries.get(str(image), {}).get(self.name)
        return text if isinstance(text, str) else None

    def write(self, image: Path, text: str, size: tuple[int, int]) -> None:
        self.entries[str(image)] = {**self.entries.get(str(image), {}), self.name: text, "image_size": list(size)}

    def close(self) -> None:
        if self.path.suffix.lower() == JSON_LINES:
            rows = [{"image_path": path, **entry} for path, entry in self.entries.items()]
            text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        else:
            text = json.dumps(self.entries, indent=2, ensure_ascii=False) + "\n"
        write_text(self.path, text)


def read_metadata_entries(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a metadata file. UserError where it is another file, which is then not written over."""
    try:
        text = read_text_file(path)
        if path.suffix.lower() == JSON_LINES:
            rows = [decode_json(line) for line in text.splitlines() if line.strip()]
            found: Any = {row.pop("image_path"): row for row in rows}
        else:
            found = decode_json(text)
        if not isinstance(found, Mapping) or not all(isinstance(entry, dict) for entry in found.values()):
            raise ValueError("an entry for each image was expected")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"--output_path: {path} exists and is no metadata file ({error})",
            code="metadata-file-invalid",
            fix="give another file, or remove this one",
        ) from error
    return dict(found)
