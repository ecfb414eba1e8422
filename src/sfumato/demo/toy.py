"""Toy checkpoints: small random models in the real file formats of each family."""

from __future__ import annotations

import importlib
import pkgutil
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import sfumato.demo
from sfumato.common.registry import Registry, did_you_mean
from sfumato.demo.photos import find_example_photos
from sfumato.errors import UserError

Layout = Literal["original", "diffusers"]

MODULE_PREFIX = "toy_"  # of the modules that know one family each
LAUNCHERS = Path(__file__).parents[3] / "launchers"  # in a checkout; an installed package has none
TOY_WORDS = (  # of common captions, so that the toy tokenizers need few tokens for them
    *("a", "an", "the", "and", "of", "on", "in", "to", "with", "at", "its", "one", "two", "both"),
    *("photo", "picture", "portrait", "close", "up", "wide", "tall", "side", "background", "blurred"),
    *("cat", "dog", "chelsea", "tabby", "face", "eyes", "eye", "nose", "chin", "whiskers", "fur", "striped"),
    *("red", "green", "blue", "white", "black", "pink", "open", "facing", "left", "right", "looking"),
    *("cup", "coffee", "espresso", "saucer", "table", "wooden", "rocket", "launch", "pad", "sky", "dusk", "lights"),
)
QUICK_OPTIONS = {  # options of the printed command: a run that ends within seconds
    "caption_extension": ".txt",
    "resolution": "64",
    "train_batch_size": "2",
    "network_dim": "4",
    "learning_rate": "1e-3",
    "max_train_steps": "10",
    "seed": "42",
}


class WriteToy(Protocol):
    """Writes the files of a toy; gives option name -> path, and tokenizer's folder name -> path."""

    def __call__(self, folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]: ...


@dataclass(frozen=True, kw_only=True)
class Toy:
    """How to write one family's toy, and the options that train on it."""

    write: WriteToy
    script: str  # launchers/SCRIPT.py
    options: Mapping[str, str] = field(default_factory=dict)  # of the printed command, beyond paths and QUICK_OPTIONS
    variants: tuple[str, ...] = ("",)  # the first is the default
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
    register_toys()
    toy = TOYS.get(family)
    if (variant or toy.variants[0]) not in toy.variants:
        raise UserError(
            f"the toy {family!r} has no variant {variant!r}",
            code="toy-variant-unknown",
            fix=did_you_mean(variant, toy.variants),
        )
    return toy.write(folder, seed=seed, layout=layout, variant=variant or toy.variants[0])


def register_toys() -> None:
    """Import every family's module, which registers its toy."""
    for family in list_toy_families():
        importlib.import_module(f"{sfumato.demo.__name__}.{MODULE_PREFIX}{family}")


def list_toy_families() -> list[str]:
    """The families that have a toy; nothing is imported."""
    modules = (module.name for module in pkgutil.iter_modules(sfumato.demo.__path__))
    return [name.removeprefix(MODULE_PREFIX) for name in modules if name.startswith(MODULE_PREFIX)]


def make_training_command(family: str, paths: Mapping[str, Path], output_dir: Path, *, variant: str = "") -> str:
    """A line for a POSIX shell, in any folder, that trains on a toy."""
    toy = TOYS.get(family)
    files = {name: path for name, path in paths.items() if not name.startswith("tokenizer")}  # found beside the model
    files |= {"train_data_dir": find_example_photos(), "output_dir": output_dir}
    absolute = {name: str(path.resolve()) for name, path in files.items()}
    values = {**absolute, **QUICK_OPTIONS, **toy.options, **toy.variant_options.get(variant, {})}
    options = (f"--{name}={value}" if value else f"--{name}" for name, value in values.items())
    return shlex.join([sys.executable, *find_launcher(toy.script), *options])


def find_launcher(script: str) -> list[str]:
    """The arguments for Python: the launcher of a checkout, else the same script of the installed package."""
    file = LAUNCHERS / f"{script}.py"
    return [str(file)] if file.is_file() else ["-m", "sfumato.compat", script]
