"""An editor of a folder for tests: as the command makes it, without its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfumato.cli.dataset_edit import DatasetEditOptions, make_edit_config
from sfumato.config.command import read_command
from sfumato.tools.editor.session import EditSession
from sfumato.tools.editor.sources import EditedDataset, find_edited_dataset
from sfumato.tools.editor.text_changes import TextChange
from sfumato.tools.editor.token_counts import TokenCounter

LIMIT = 6  # tokens


def find_dataset(folder: Path, *words: str) -> EditedDataset:
    line = read_command([str(folder), "--cache_dir", str(folder.parent / "cache"), *words], DatasetEditOptions)
    return find_edited_dataset(make_edit_config(line))


class Editor:
    """A session, by names of files. Tokens are words."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        counter = TokenCounter(lambda: {"words": (lambda texts: [len(text.split()) for text in texts], LIMIT)})
        self.session = EditSession(find_dataset(folder, *words), counter)
        self.numbers = {path.name: number for number, path in enumerate(self.session.files.paths)}

    def text(self, name: str) -> str:
        return self.session.files.contents[self.numbers[name]].text

    def faults(self, name: str) -> set[str]:
        files = {file["id"]: file for file in self.session.list_changes(0)["files"]}
        return set(files[self.numbers[name]]["faults"])

    def edit(self, name: str, text: str, *, base: str | None = None) -> dict[str, Any]:
        return self.session.edit(self.numbers[name], text, base=self.text(name) if base is None else base)

    def change(self, change: TextChange) -> dict[str, Any]:
        return self.session.change_many(list(self.numbers.values()), change)
