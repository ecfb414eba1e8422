"""`sfumato dataset merge-captions` and `merge-tags`: texts beside images into one metadata file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sfumato.cli.dataset_tag import CAPTION_ALIASES
from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import read_command
from sfumato.config.values import Extension, FilePath


class CaptionMergeOptions(Options):
    """Gathers the captions beside images in a metadata file, as datasets of fine-tuning have it."""

    train_data_dir: FilePath = option(None, "the folder of images", positional=True, required=True)
    out_json: FilePath = option(None, "the metadata file to write", positional=True, required=True)
    in_json: FilePath | None = option(None, "a metadata file to start from; by default the one to write, if it exists")
    caption_extension: Extension = option(".caption", "extension of the files that are read")
    full_path: bool = option(False, "name images by their paths, for images in several folders")
    recursive: bool = option(False, "read subfolders, too")
    debug: bool = option(False, "print each text")


class TagMergeOptions(Options):
    """Gathers the tags beside images in a metadata file, as datasets of fine-tuning have it."""

    train_data_dir: FilePath = option(None, "the folder of images", positional=True, required=True)
    out_json: FilePath = option(None, "the metadata file to write", positional=True, required=True)
    in_json: FilePath | None = option(None, "a metadata file to start from; by default the one to write, if it exists")
    full_path: bool = option(False, "name images by their paths, for images in several folders")
    recursive: bool = option(False, "read subfolders, too")
    caption_extension: Extension = option(".txt", "extension of the files that are read")
    debug: bool = option(False, "print each text")


def merge_captions(argv: Sequence[str]) -> int:
    """Run `sfumato dataset merge-captions`."""
    return run_command_line("sfumato dataset merge-captions", argv, CaptionMergeOptions)


def merge_tags(argv: Sequence[str]) -> int:
    """Run `sfumato dataset merge-tags`."""
    return run_command_line("sfumato dataset merge-tags", argv, TagMergeOptions)


def run_command_line(
    program: str, argv: Sequence[str], theme: type[CaptionMergeOptions] | type[TagMergeOptions]
) -> int:
    if asks_for_help(argv):
        sys.stdout.write(command_help(program, theme))
        return 0
    line = read_command(argv, theme, training=False, aliases=CAPTION_ALIASES)
    line.raise_faults()
    return run_merge_of_texts(line.options(theme))


def run_merge_of_texts(options: CaptionMergeOptions | TagMergeOptions) -> int:
    """Merge; gives the exit code."""
    from sfumato.tools.metadata_texts import TextMerge

    name = "caption" if isinstance(options, CaptionMergeOptions) else "tags"
    merge = TextMerge(
        target=options.out_json,
        name=name,
        extension=options.caption_extension,
        source=options.in_json,
        full_path=options.full_path,
        recursive=options.recursive,
        verbose=options.debug,
    )
    count = merge.run(options.train_data_dir)
    sys.stdout.write(f"{options.out_json} has the {name} of {count:,} images\n")
    return 0
