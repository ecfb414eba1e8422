"""Toy checkpoints: small random models in each family's real file formats, and a command that trains on them."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import sfumato.demo
from sfumato.common.registry import Registry, did_you_mean
from sfumato.demo.photos import example_photos
from sfumato.errors import UserError

Layout = Literal["original", "diffusers"]

PREFIX = "toy_"  # of the modules that know one family each
LAUNCHERS = Path(__file__).parents[3] / "launchers"  # in a checkout; an installed package has none
WORDS = (  # of common captions, so that the toy tokenizers need few tokens for them
    *("a", "an", "the", "and", "of", "on", "in", "to", "with", "at", "its", "one", "two", "both"),
    *("photo", "picture", "portrait", "close", "up", "wide", "tall", "side", "background", "blurred"),
    *("cat", "dog", "chelsea", "tabby", "face", "eyes", "eye", "nose", "chin", "whiskers", "fur", "striped"),
    *("red", "green", "blue", "white", "black", "pink", "open", "facing", "left", "right", "looking"),
    *("cup", "coffee", "espresso", "saucer", "table", "wooden", "rocket", "launch", "pad", "sky", "dusk", "lights"),
)
QUICK = {  # options of the printed command: a run that ends within seconds
    "caption_extension": ".txt",
    "resolution": "64",
    "train_batch_size": "2",
    "network_dim": "4",
    "learning_rate": "1e-3",
    "max_train_steps": "10",
    "seed": "42",
}


class Writer(Protocol):
    def __call__(self, folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]: ...


@dataclass(frozen=True, kw_only=True)
class Toy:
    """How one family's toy is written, and how a user would train on it."""

    write: Writer  # gives option name -> path, besides the tokenizers, which are found beside the checkpoint
    script: str  # launchers/SCRIPT.py
    options: Mapping[str, str] = field(default_factory=dict)  # of the printed command, beyond paths and QUICK
    variants: tuple[str, ...] = ("",)  # the first is the usual one
    variant_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # further options of a variant


TOYS: Registry[Toy] = Registry("toy")


def write_toy(
    family: str, folder: Path, *, seed: int = 0, layout: Layout = "original", variant: str = ""
) -> dict[str, Path]:
    """Write a family's toy into `folder`; gives component -> path, the same bytes for the same arguments.

    Components are named by the options that take them (pretrained_model_name_or_path, clip_l, ...), tokenizers by
    their folders. layout "diffusers" writes the same weights as a folder for the family's diffusers pipeline.
    Raises UserError for a family or variant without a toy.
    """
    register_all()
    toy = TOYS.get(family)
    if (variant or toy.variants[0]) not in toy.variants:
        raise UserError(f"the toy {family!r} has no variant {variant!r}", fix=did_you_mean(variant, toy.variants))
    return toy.write(folder, seed=seed, layout=layout, variant=variant or toy.variants[0])


def register_all() -> None:
    """Import every family's module, which registers its toy."""
    for family in families():
        importlib.import_module(f"{sfumato.demo.__name__}.{PREFIX}{family}")


def families() -> list[str]:
    """The families that have a toy; nothing is imported."""
    modules = (module.name for module in pkgutil.iter_modules(sfumato.demo.__path__))
    return [name.removeprefix(PREFIX) for name in modules if name.startswith(PREFIX)]


def training_command(family: str, paths: Mapping[str, Path], output_dir: Path, *, variant: str = "") -> str:
    """A line for a POSIX shell, in any folder, that trains on a toy."""
    toy = TOYS.get(family)
    places = {name: path for name, path in paths.items() if not name.startswith("tokenizer")}
    places |= {"train_data_dir": example_photos(), "output_dir": output_dir}
    absolute = {name: str(path.resolve()) for name, path in places.items()}
    values = {**absolute, **QUICK, **toy.options, **toy.variant_options.get(variant, {})}
    options = (f"--{name}={value}" if value else f"--{name}" for name, value in values.items())
    return shlex.join([sys.executable, *launcher(toy.script), *options])


def launcher(script: str) -> list[str]:
    """What Python is to run: the launcher of a checkout, else the same script of the installed package."""
    file = LAUNCHERS / f"{script}.py"
    return [str(file)] if file.is_file() else ["-m", "sfumato.compat", script]


def main(argv: Sequence[str]) -> int:
    """`sfumato toy FAMILY FOLDER`: write a toy, say what is where, and last print a command that trains on it."""
    asked = parser().parse_args(argv)
    paths = write_toy(asked.family, asked.folder, seed=asked.seed, layout=asked.layout, variant=asked.variant)
    width = max(map(len, paths))
    for name, path in paths.items():
        print(f"{name:<{width}}  {path}")
    print("\nThis trains on it, in seconds:\n")
    print(training_command(asked.family, paths, asked.folder / "output", variant=asked.variant))
    return 0


def parser() -> argparse.ArgumentParser:
    known = ", ".join(families())
    parser = argparse.ArgumentParser(
        prog="sfumato toy",
        description="Writes a small random model in a family's real file formats, for trying things out.",
        allow_abbrev=False,
    )
    parser.add_argument("family", help=f"one of {known}")
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--seed", type=int, default=0, help="the weights are a function of it [default: 0]")
    parser.add_argument(
        "--layout",
        choices=("original", "diffusers"),
        default="original",
        help="the family's own files, or a folder as diffusers' pipelines read it [default: original]",
    )
    parser.add_argument("--variant", default="", help="another model of the family, as schnell for flux")
    return parser
