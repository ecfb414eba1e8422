"""`sfumato dataset tag`: tags of images by a tagger model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sfumato.cli.options_command import run_with_options
from sfumato.common.text import plural
from sfumato.config.base import Metavar, Options, option
from sfumato.config.values import Extension, FilePath, MachineShard

if TYPE_CHECKING:
    from sfumato.tools.tag_choice import TagRules
    from sfumato.tools.tag_model import Tagger
    from sfumato.tools.tag_table import TagWriting

DEFAULT_REPO = "SmilingWolf/wd-v1-4-convnext-tagger-v2"
TagList = Annotated[str, Metavar("TAG,TAG")]
CAPTION_ALIASES = {"caption_extention": "caption_extension"}


class TagOptions(Options):
    """Writes tags beside images, as a WD14 tagger or a newer one of its kind sees them. Needs onnxruntime (pip install
    "sfumato[tagger]"). Models are downloaded once, each into a folder of its own.
    """

    train_data_dir: FilePath = option(None, "the folder of images", positional=True, required=True)
    repo_id: str = option(DEFAULT_REPO, "the model on the hub; OWNER/NAME/FOLDER for those with a tag_mapping.json")
    model_dir: FilePath = option(Path("wd14_tagger_model"), "where models are kept")
    model_file: FilePath | None = option(None, "a model of your own in the ONNX format, with its table beside it")
    force_download: bool = option(False, "download the model again")
    onnx: bool = option(False, "accepted without effect: models always run on onnxruntime")
    shard: MachineShard | None = option(
        None, "tag the I-th of N parts of the images, for several machines; the names say which"
    )
    batch_size: int = option(1, "images at once; a model with a fixed number takes that", ge=1)
    max_data_loader_n_workers: int | None = option(None, "threads that decode images; 4 by default", ge=0)
    recursive: bool = option(False, "tag the images of subfolders, too")
    caption_extension: Extension = option(".txt", "extension of the files that are written")
    caption_separator: str = option(", ", "what stands between tags")
    output_path: FilePath | None = option(None, "one .json or .jsonl file for all tags, instead of one per image")
    append_tags: bool = option(False, "keep the tags that images have, and add those that they lack")
    skip_existing: bool = option(False, "leave images alone that have tags, so that an interrupted run goes on")
    frequency_tags: bool = option(False, "print how often each tag was given")
    thresh: float = option(0.35, "probability from which on a tag is given", ge=0)
    general_threshold: float | None = option(None, "for general tags; above 1 gives none", ge=0)
    character_threshold: float | None = option(None, "for characters; above 1 gives none", ge=0)
    copyright_threshold: float | None = option(None, "for copyrights, of models that know them", ge=0)
    artist_threshold: float | None = option(None, "for artists, of models that know them", ge=0)
    meta_threshold: float | None = option(None, "for tags about the image, of models that know them", ge=0)
    model_threshold: float | None = option(None, "for generators of images, of models that know them", ge=0)
    remove_underscore: bool = option(False, "write spaces for underscores, except in faces like ^_^")
    undesired_tags: TagList = option("", "tags that are never given, in the spelling of the captions")
    tag_replacement: Annotated[str, Metavar("OLD,NEW;OLD,NEW")] = option(
        "", r"what to write for a tag; \, and \; for commas and semicolons in tags"
    )
    character_tag_expand: bool = option(False, "write name_(series) as two tags")
    character_tags_first: bool = option(False, "characters before the general tags")
    always_first_tags: TagList = option("", "tags that go to the front where an image has them, the last one foremost")
    use_rating_tags: bool = option(False, "the rating as the first tag")
    use_rating_tags_as_last_tag: bool = option(False, "the rating as the last tag")
    use_quality_tags: bool = option(False, "the quality as the first tag, of models that know it")
    use_quality_tags_as_last_tag: bool = option(False, "the quality as the last tag, of models that know it")
    debug: bool = option(False, "print the tags of each image")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset tag`."""
    return run_with_options("sfumato dataset tag", argv, TagOptions, run_tagging, aliases=CAPTION_ALIASES)


def run_tagging(options: TagOptions) -> int:
    """Tag the images; gives the exit code."""
    from sfumato.tools.caption_output import DEFAULT_WORKERS, JSON_LINES, FilesBeside, MetadataFile
    from sfumato.tools.image_batches import list_image_paths
    from sfumato.tools.tag_choice import TagChooser
    from sfumato.tools.tag_images import TagRun
    from sfumato.tools.tag_table import write_tags

    writing = make_writing(options)
    images = list_image_paths(options.train_data_dir, recursive=options.recursive, shard=options.shard)
    tagger = open_tagger(options)
    table = write_tags(tagger.table, writing)
    chooser = TagChooser(table, make_rules(options, is_mapping=table.is_mapping))
    files = FilesBeside(extension=options.caption_extension)
    is_lines = options.output_path is not None and options.output_path.suffix.lower() == JSON_LINES
    name = "caption" if is_lines else "tags"  # as sd-scripts calls them
    run = TagRun(
        tagger=tagger,
        chooser=chooser,
        output=MetadataFile(path=options.output_path, name=name) if options.output_path else files,
        separator=options.caption_separator,
        append=options.append_tags,
        skip_existing=options.skip_existing,
        verbose=options.debug,
    )
    bad = run.tag(images, batch_size=options.batch_size, workers=options.max_data_loader_n_workers or DEFAULT_WORKERS)
    if options.frequency_tags:
        sys.stdout.write("".join(f"{tag}: {count}\n" for tag, count in chooser.counts.most_common()))
    skipped = f", {bad:,} could not be read" if bad else ""
    sys.stdout.write(f"{len(images) - bad:,} of {plural(len(images), 'image has', 'images have')} tags{skipped}\n")
    return 0


def open_tagger(options: TagOptions) -> Tagger:
    from sfumato.tools.tag_model import find_model_files, find_table, list_stale_files, load_tagger

    if options.model_file is not None:
        return load_tagger(options.model_file, find_table(options.model_file))
    stale = list_stale_files(options.model_dir)
    if stale:
        names = ", ".join(map(str, stale))
        sys.stderr.write(f"note: {names}: not used and can be removed, since each model has a folder of its own now\n")
    files = find_model_files(options.repo_id, options.model_dir, force_download=options.force_download)
    return load_tagger(*files)


def make_writing(options: TagOptions) -> TagWriting:
    from sfumato.tools.tag_table import TagWriting, parse_replacements

    return TagWriting(
        separator=options.caption_separator,
        remove_underscore=options.remove_underscore,
        expand_characters=options.character_tag_expand,
        replacements=parse_replacements(options.tag_replacement),
    )


def make_rules(options: TagOptions, *, is_mapping: bool) -> TagRules:
    """Where a tag is asked for at both ends, it comes first, or last with a tag_mapping.json (as in sd-scripts)."""
    from sfumato.tools.tag_choice import TagRules
    from sfumato.tools.tag_table import split_tag_list

    given = {
        "general": options.general_threshold,
        "character": options.character_threshold,
        "copyright": options.copyright_threshold,
        "artist": options.artist_threshold,
        "meta": options.meta_threshold,
        "model": options.model_threshold,
    }
    ends = ("last", "first") if is_mapping else ("first", "last")

    def choose_end(first: bool, last: bool) -> str:
        asked = {"first": first, "last": last}
        return next((end for end in ends if asked[end]), "")

    return TagRules(
        thresholds={name: options.thresh if value is None else value for name, value in given.items()},
        rating=choose_end(options.use_rating_tags, options.use_rating_tags_as_last_tag),
        quality=choose_end(options.use_quality_tags, options.use_quality_tags_as_last_tag),
        characters_first=options.character_tags_first,
        undesired=frozenset(split_tag_list(options.undesired_tags, options.caption_separator)),
        always_first=split_tag_list(options.always_first_tags, options.caption_separator),
    )
