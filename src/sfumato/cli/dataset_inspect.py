"""`sfumato dataset inspect`: what is in a dataset, and what training would refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli.exits import run_guarded
from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import NO_TRIALS, CommandLine, read_command
from sfumato.config.load import load_command_config
from sfumato.config.values import FilePath

if TYPE_CHECKING:
    from sfumato.config import Config

INSPECTION_SKIPS = ("model-missing", "output-missing")  # rules
DEFAULT_BUCKETS = {"resolution": (1024, 1024), "enable_bucket": True}


class DatasetInspectOptions(Options):
    """Shows of each folder how many images, captions and tags there are, which files are damaged or have no caption,
    which captions are truncated, and how images fall into buckets. Changes nothing. Takes the options of
    `sfumato train` about data, --resolution above all; --tokenizer or a model's folder counts that model's tokens,
    else CLIP's are counted.
    """

    dataset: FilePath | None = option(None, "a folder of images, or a .toml or .json dataset file", positional=True)
    html: FilePath | None = option(None, "write a page with images as the model sees them; it needs no other file")
    pictures: int = option(48, "how many images of each folder the page shows", ge=0)
    run: FilePath | None = option(
        None, "instead of a dataset: the images of a run by their loss; its --output_dir, or its NAME.run.jsonl"
    )
    headers_only: bool = option(False, "do not decode every image, which finds damage but is slow for many")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset inspect`."""
    if asks_for_help(argv):
        print(command_help("sfumato dataset inspect", DatasetInspectOptions), end="")
        return 0
    line = read_command(argv, DatasetInspectOptions, absent=NO_TRIALS)
    options = line.options(DatasetInspectOptions)
    if options.run is not None:
        return rank_by_loss(line, options, options.run)
    config = make_inspect_config(line)
    from sfumato.tools.dataset_inspect import inspect_dataset

    def run() -> None:
        inspect_dataset(
            config, html=options.html, images_per_subset=options.pictures, decoding=not options.headers_only
        )

    return run_guarded(run, debug=config.log.debug)


def rank_by_loss(line: CommandLine, options: DatasetInspectOptions, run: Path) -> int:
    """The images of a run; gives the exit code."""
    if options.dataset is not None:
        line.problems.add(
            "--run shows the images of a run, whatever the dataset",
            code="inspect-run-and-dataset",
            fix="give one of them",
        )
    line.raise_faults()
    from sfumato.tools.run_losses import show_run_losses

    show_run_losses(run, html=options.html, images_on_page=options.pictures)
    return 0


def make_inspect_config(line: CommandLine) -> Config:
    """The config, with the dataset that the command names, and a resolution where none is given."""
    name_dataset(line, line.options(DatasetInspectOptions).dataset)
    config = load_command_config(line, skip_rules=INSPECTION_SKIPS)
    if config.dataset.dataset_config is None and config.buckets.resolution is None:
        print("no --resolution given: buckets are those of 1024")
        return load_command_config(line, defaults=DEFAULT_BUCKETS, skip_rules=INSPECTION_SKIPS)
    return config


def name_dataset(line: CommandLine, dataset: Path | None) -> None:
    """Take the dataset that a command names first, a folder or a file, for the option that it stands for."""
    if dataset is not None:
        name = "dataset_config" if dataset.suffix in (".toml", ".json") else "train_data_dir"
        line.set_option(name, dataset, place="DATASET")
