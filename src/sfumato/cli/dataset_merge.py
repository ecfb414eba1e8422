"""`sfumato dataset merge-captions` and `merge-tags`: texts beside images into one metadata file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sfumato.cli.dataset_tag import CAPTION_ALIASES
from sfumato.cli.options_command import run_with_options
from sfumato.common.text import plural
from sfumato.config.base import Options, option
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
    program = "sfumato dataset merge-captions"
    return run_with_options(program, argv, CaptionMergeOptions, run_merge_of_texts, aliases=CAPTION_ALIASES)


def merge_tags(argv: Sequence[str]) -> int:
    """Run `sfumato dataset merge-tags`."""
    program = "sfumato dataset merge-tags"
    return run_with_options(program, argv, TagMergeOptions, run_merge_of_texts, aliases=CAPTION_ALIASES)


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
    sys.stdout.write(f"{options.out_json} has the {name} of {plural(count, 'image')}\n")
    return 0
