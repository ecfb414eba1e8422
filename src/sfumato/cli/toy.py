"""`sfumato toy`: write a toy checkpoint, list its files, and print a command that trains on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import read_options
from sfumato.config.values import FilePath, Seed


class ToyOptions(Options):
    """Writes a small random model in a family's real file formats, for trying things out."""

    family: str = option(None, "the model family", positional=True, required=True)
    folder: FilePath = option(None, "the folder to write into", positional=True, required=True)
    seed: Seed = option(0, "seed of the weights")
    layout: Literal["original", "diffusers"] = option(
        "original", "the family's own files, or a folder that diffusers' pipelines read"
    )
    variant: str = option("", "another model of the family, e.g. schnell for flux")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato toy`."""
    from sfumato.demo.toy import list_toy_families, make_training_command, write_toy

    if asks_for_help(argv):
        print(f"{command_help('sfumato toy', ToyOptions)}\nFamilies: {', '.join(list_toy_families())}")
        return 0
    options = read_options(argv, ToyOptions)
    paths = write_toy(options.family, options.folder, seed=options.seed, layout=options.layout, variant=options.variant)
    width = max(map(len, paths))
    for name, path in paths.items():
        print(f"{name:<{width}}  {path}")
    print("\nThis trains on it, in seconds:\n")
    print(make_training_command(options.family, paths, options.folder / "output", variant=options.variant))
    return 0
