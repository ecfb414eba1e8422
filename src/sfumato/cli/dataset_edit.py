"""`sfumato dataset edit`: captions, edited in a local page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfumato.cli.dataset_inspect import INSPECTION_SKIPS, name_dataset
from sfumato.cli.exits import run_guarded
from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import NO_TRIALS, CommandLine, read_command
from sfumato.config.load import load_command_config
from sfumato.config.values import FilePath

if TYPE_CHECKING:
    from sfumato.config import Config

EDIT_HIGHLIGHTS = ("caption_extension", "caption_separator", "tokenizer", "max_token_length", "cache_dir")


class DatasetEditOptions(Options):
    """Opens a page on this computer to look through images and edit their captions: filter by text, tag or fault,
    change many at once, undo everything. Only caption files beside the images are written, each whole or not at all.
    """

    dataset: FilePath | None = option(None, "a folder of images, or a .toml or .json dataset file", positional=True)
    port: int = option(0, "port of the page; a free one by default", ge=0, le=65535)
    open_browser: bool = option(False, "open the page in the browser of this computer")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset edit`."""
    if asks_for_help(argv):
        sys.stdout.write(command_help("sfumato dataset edit", DatasetEditOptions, highlights=EDIT_HIGHLIGHTS))
        return 0
    line = read_command(argv, DatasetEditOptions, absent=NO_TRIALS)
    options = line.options(DatasetEditOptions)
    config = make_edit_config(line)
    from sfumato.tools.editor.run import edit_dataset

    def run() -> None:
        edit_dataset(config, port=options.port, open_browser=options.open_browser)

    return run_guarded(run, debug=config.log.debug)


def make_edit_config(line: CommandLine) -> Config:
    """The config, with the dataset that the command names."""
    name_dataset(line, line.options(DatasetEditOptions).dataset)
    return load_command_config(line, skip_rules=INSPECTION_SKIPS)
