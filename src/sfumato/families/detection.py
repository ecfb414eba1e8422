"""From the options of the base model to its family and blueprint: the only way to a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from sfumato.config import Config
from sfumato.data.find.bucket_settings import SizeSteps
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.blueprint import Blueprint
from sfumato.families.foreign_keys import describe_passed_over, is_redundant
from sfumato.families.model_options import read_base_resolution
from sfumato.families.source import Source, open_source
from sfumato.formats.checkpoint import Checkpoint


def describe_model(config: Config) -> tuple[type[Family], Blueprint]:
    """Find the checkpoint, its family, and what its headers say; UserError where a file is of another kind."""
    family, source = detect_family(config)
    blueprint = family.read(source, config.model, config.noise)
    return family, replace(blueprint, declared=(*blueprint.declared, *describe_unused_keys(blueprint)))


def detect_family(config: Config) -> tuple[type[Family], Source]:
    """The family that the options name, or the one whose checkpoint it is."""
    register_families()
    source = open_source(config.model)
    return find_family(config.model.model_type or config.run.family, source), source


def describe_unused_keys(blueprint: Blueprint) -> Iterator[str]:
    """A line for each file with keys that no network of the model has a place for and that something else may need."""
    used: dict[int, set[str]] = defaultdict(set)
    files: dict[int, Checkpoint] = {}
    for network in blueprint.networks.values():
        file = network.weights.file
        files[id(file)] = file
        used[id(file)].update(network.weights.list_used_keys())
    for number, file in files.items():
        unused = [key for key in file.header.tensors if key not in used[number] and not is_redundant(key)]
        if unused:
            yield describe_passed_over(file.header.path, unused)


def with_base_resolution(config: Config, blueprint: Blueprint) -> Config:
    """The config with the checkpoint's own resolution where none was given."""
    base = read_base_resolution(blueprint)
    return config if config.buckets.resolution is not None or base is None else config.with_values({"resolution": base})


def read_size_steps(family: type[Family] | None) -> SizeSteps:
    """What sides of images must be multiples of, in pixels, with and without buckets; 1 where no model is known."""
    if family is None:
        return SizeSteps(bucket=1, single=1)
    return SizeSteps(bucket=family.bucket_step, single=family.sampling.size_multiple)
