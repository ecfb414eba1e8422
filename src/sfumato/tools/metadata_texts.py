"""The texts beside images, gathered in one metadata file: a JSON object with an entry for each image."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from sfumato.common.files import check_file_writable
from sfumato.common.text import list_some
from sfumato.common.text_files import read_text_file
from sfumato.errors import UserError
from sfumato.tools.caption_output import MetadataFile, read_metadata_entries
from sfumato.tools.image_batches import list_image_paths


@dataclass(frozen=True, kw_only=True)
class TextMerge:
    """name: of the text in an entry, caption or tags. source: a metadata file to start from; by default the target
    itself, where it exists. full_path: entries have the paths of their images, by default names without an ending.
    """

    target: Path
    name: str
    extension: str
    source: Path | None = None
    full_path: bool = False
    recursive: bool = False
    verbose: bool = False

    def run(self, folder: Path) -> int:
        """Add the text of every image of a folder, in the place of the one that its entry has; gives how many."""
        images = list_image_paths(folder, recursive=self.recursive)
        check_file_writable(self.target, option="the metadata file")
        source = self.source or (self.target if self.target.exists() else None)
        entries = {} if source is None else read_metadata_entries(source)
        texts = {path: self._read(path) for path in images}
        found = {self._make_key(path): text for path, text in texts.items() if text is not None}
        if len(found) < len(texts) - list(texts.values()).count(None):
            raise UserError(
                f"several images below {folder} have one name, of which a metadata file can only hold one",
                code="metadata-names-equal",
                fix="--full_path keeps them apart",
            )
        for key, text in found.items():
            entries.setdefault(key, {})[self.name] = text
            if self.verbose:
                sys.stdout.write(f"{key}: {text}\n")
        MetadataFile(path=self.target, name=self.name, entries=entries).close()
        missing = [str(path) for path, text in texts.items() if text is None]
        if missing:
            sys.stderr.write(f"no {self.extension} file beside {list_some(missing)}\n")
        return len(found)

    def _make_key(self, path: Path) -> str:
        return str(path) if self.full_path else path.stem

    def _read(self, image: Path) -> str | None:
        """The text beside an image, whose file has its name with another ending, or with one more."""
        for path in (image.with_suffix(self.extension), image.with_name(image.name + self.extension)):
            if path.exists():
                try:
                    return read_text_file(path).strip()
                except OSError as error:
                    raise UserError(
                        f"{path} cannot be read ({error.strerror})",
                        code="caption-file-unreadable",
                        fix="check that it may be read",
                    ) from error
        return None
