"""From the options of the base model to its family and blueprint: the only way to a model."""

from __future__ import annotations

from sfumato.config import Config
from sfumato.data.find.bucket_settings import SizeSteps
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.blueprint import Blueprint
from sfumato.families.model_options import read_base_resolution
from sfumato.families.source import Source, open_source


def describe_model(config: Config) -> tuple[type[Family], Blueprint]:
    """Find the checkpoint, its family, and what its headers say; UserError where a file is of another kind."""
    family, source = detect_family(config)
    return family, family.read(source, config.model, config.noise)


def detect_family(config: Config) -> tuple[type[Family], Source]:
    """The family that the options name, or the one whose checkpoint it is."""
    register_families()
    source = open_source(config.model)
    return find_family(config.model.model_type or config.run.family, source), source


def with_base_resolution(config: Config, blueprint: Blueprint) -> Config:
    """The config with the checkpoint's own resolution where none was given."""
    base = read_base_resolution(blueprint)
    return config if config.buckets.resolution is not None or base is None else config.with_values({"resolution": base})


def read_size_steps(family: type[Family] | None) -> SizeSteps:
    """What sides of images must be multiples of, in pixels, with and without buckets; 1 where no model is known."""
    if family is None:
        return SizeSteps(bucket=1, single=1)
    return SizeSteps(bucket=family.bucket_step, single=family.sampling.size_multiple)
