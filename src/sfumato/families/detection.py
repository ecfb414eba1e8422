"""From the options of the base model to its family and blueprint: the only way to a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import torch

from sfumato.config import Config
from sfumato.data.find.bucket_settings import SizeSteps
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.blueprint import Blueprint
from sfumato.families.cached_encoders import read_cached_encoders
from sfumato.families.foreign_keys import describe_passed_over, is_redundant
from sfumato.families.model_options import read_base_resolution
from sfumato.families.source import Source, open_source
from sfumato.formats.checkpoint import SAVE_DTYPES, Checkpoint
from sfumato.quantization.choice import choose_text_format, describe_precision


def describe_model(config: Config, *, with_cached: bool = False) -> tuple[type[Family], Blueprint]:
    """Find the checkpoint, its family, and what its headers say; UserError where a file is of another kind.

    with_cached: whether the cache on disk may stand for encoders whose files are not here.
    """
    family, source = detect_family(config)
    if with_cached:
        source = add_cached_encoders(config, family, source)
    blueprint = family.read(source, config.model, config.noise)
    return family, replace(blueprint, declared=(*blueprint.declared, *describe_unused_keys(blueprint)))


def detect_family(config: Config) -> tuple[type[Family], Source]:
    """The family that the options name, or the one whose checkpoint it is."""
    register_families()
    source = open_source(config.model)
    return find_family(config.model.model_type or config.run.family, source), source


def add_cached_encoders(config: Config, family: type[Family], source: Source) -> Source:
    """The source with what may stand for encoders whose files are not here."""
    dtype = SAVE_DTYPES.get(config.memory.mixed_precision) or torch.float32  # the same names for the same dtypes
    text_format = choose_text_format(config.memory)

    def name_precision(part: str) -> str:
        own = family.choose_dtype(part, dtype, config.model)
        return describe_precision(own, text_format if part in family.text_parts else None)

    cached = read_cached_encoders(config, family.name, family.text_parts, name_precision)
    return replace(source, cached=cached, opened=None if source.is_folder else source.file)


def describe_cached_encoders(config: Config, blueprint: Blueprint) -> Iterator[str]:
    """A line for each encoder whose file is not here, and what that prevents."""
    for part in blueprint.cached_parts:
        record = blueprint.networks[part].record
        yield f"{part}: its file is not here; its outputs in the cache are used, those of {record}"
    if not blueprint.cached_parts or config.samples.sample_prompts is None:
        return
    if "vae" in blueprint.cached_parts:
        option = blueprint.networks["vae"].option
        yield f"--sample_prompts: no previews are made, since the file of the VAE is not here (--{option} FILE)"
    else:
        parts = " and ".join(blueprint.cached_parts)
        yield f"--sample_prompts: previews are made of those prompts whose outputs of {parts} are in the cache"


def describe_idle_choices(config: Config, blueprint: Blueprint) -> Iterator[str]:
    """A line for each value of --cached_encoder that has no effect."""
    for choice in config.cache.cached_encoder:
        part = choice.partition("=")[0]
        if part not in blueprint.networks:
            yield f"--cached_encoder {choice} has no effect: the model has no {part} ({', '.join(blueprint.networks)})"
        elif part not in blueprint.cached_parts:
            yield f"--cached_encoder {choice} has no effect: the file of {part} is here and is used"


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
