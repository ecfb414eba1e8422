"""What can be wrong with the files that samples and metadata are made from; seen before the first weight is read."""

from __future__ import annotations

from pathlib import Path

from sfumato.common.files import check_file_writable, check_writable
from sfumato.config.output_rules import samples_enabled
from sfumato.config.prompts import read_prompts
from sfumato.config.schema import Config
from sfumato.errors import Problems, UserError


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


def check_places(config: Config, problems: Problems) -> None:
    """Every file and folder that the run will make must be one that can be written."""
    folders = {"--output_dir": config.save.output_dir, "--logging_dir": config.log.logging_dir}
    for option, folder in folders.items():
        with problems.catch():
            if folder is not None:
                check_writable(folder, option=option)
    files = {"--console_log_file": config.log.console_log_file, "--plot_timesteps": config.run.plot_timesteps}
    for option, file in files.items():
        with problems.catch():
            if file is not None:
                check_file_writable(file, option=option)


def check_thumbnail(config: Config) -> None:
    """A thumbnail that is no data URL must be a file."""
    source = config.metadata.metadata_thumbnail
    if source and not source.startswith("data:") and not Path(source).is_file():
        raise UserError(
            f"--metadata_thumbnail: {source[:200]} does not exist",
            code="thumbnail-missing",
            fix="give an image file, or a data URL",
        )
