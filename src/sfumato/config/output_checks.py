"""What can be wrong with the files that samples and metadata are made from; seen before the first weight is read."""

from __future__ import annotations

from pathlib import Path

from sfumato.config.output_rules import samples_enabled
from sfumato.config.prompts import read_prompts
from sfumato.config.schema import Config
from sfumato.errors import UserError


def check_prompts(config: Config) -> list[str]:
    """The file of prompts is read anew for every preview, where a fault is only a warning; here it is an error.

    A file without prompts is noted: front ends write one whether samples are wanted or not.
    """
    path = config.samples.sample_prompts
    if path is None or not samples_enabled(config) or read_prompts(path):
        return []
    what = f"there are no samples: the file of --sample_prompts, {path.name}, has no prompt"
    if config.log.strict:
        raise UserError(what, code="sample-prompts-empty")
    return [what]


def check_thumbnail(config: Config) -> None:
    """A thumbnail that is no data URL must be a file."""
    source = config.metadata.metadata_thumbnail
    if source and not source.startswith("data:") and not Path(source).is_file():
        raise UserError(
            f"--metadata_thumbnail: {source[:200]} does not exist",
            code="thumbnail-missing",
            fix="give an image file, or a data URL",
        )
