"""What each dataset and subset is set to: subset before dataset before [general] before command line before default."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.config.dataset_toml import (
    DATASET_KEYS,
    OPTION_OF,
    PRESERVE,
    SUBSET_KEYS,
    DatasetFile,
    Table,
    read_dataset_config,
)
from sfumato.config.schema import vocabulary
from sfumato.data.augment import ImageRules
from sfumato.data.buckets import Buckets, Size
from sfumato.data.captions import CaptionRules
from sfumato.data.find.folder_layout import FolderSubset, folder_subsets
from sfumato.data.find.report import Report
from sfumato.errors import UserError

Tables = tuple[Table, ...]
REMEMBERED = "metadata_cache.json"  # what other programs write with cache_info


def dataset_settings(
    config: Config, *, bucket_step: int, report: Report
) -> list[tuple[DatasetSettings | None, list[SubsetSettings]]]:
    """The datasets of --dataset_config, or the one that the options make, each with its subsets.

    Faults go to the report's problems; None for a dataset with a fault, whose subsets can still be looked at.
    """
    found: list[tuple[DatasetSettings | None, list[SubsetSettings]]] = []
    for where, tables, subsets in layouts(config, report):
        settings = None
        with report.problems.catch():
            settings = one_dataset(where, tables, subsets, config, bucket_step, report)
        found.append((settings, subsets))
    return found


def layouts(config: Config, report: Report) -> Iterator[tuple[str, Tables, list[SubsetSettings]]]:
    """(name for messages, the tables that hold for the whole dataset, its subsets)."""
    path = config.dataset.dataset_config
    if config.dataset.dataset_class is not None or path is None:
        subsets = list(of_options(config, report))
        if subsets:
            yield "", (), subsets
        return
    file = read_dataset_config(path, report.problems)
    if file is None:
        return
    for line in overridden(file, config):
        report.no_effect(line)
    for i, entry in enumerate(file.datasets):
        where = f"{path}: datasets[{i}]"
        tables = (entry.table, file.general)
        subsets = [
            one_subset(f"{where}.subsets[{j}]", (subset, *tables), config)
            for j, subset in enumerate(entry.subsets)
            if j not in entry.faulty and (subset.value("image_dir") or subset.value("metadata_file"))
        ]
        if subsets and entry.sound:
            yield where, tables, list(without_repetitions(subsets, report))


def of_options(config: Config, report: Report) -> Iterator[SubsetSettings]:
    """The subsets that the options make without a dataset file."""
    options = config.dataset
    if options.dataset_class is not None:
        yield replace(
            one_subset(f"--dataset_class {options.dataset_class}", (), config),
            dataset_class=options.dataset_class,
            plugin_facts={
                "resolution": config.buckets.resolution,
                "max_token_length": config.model.max_token_length,
                "debug_dataset": options.debug_dataset,
                "seed": config.loop.seed,
            },
        )
    elif options.in_json is not None:
        subset = one_subset(f"--in_json {options.in_json}", (), config)
        yield replace(subset, metadata_file=options.in_json, image_dir=options.train_data_dir)
    else:
        for folder in folder_subsets(config, report):
            yield one_subset(str(folder.image_dir), (), config, folder=folder)


def overridden(file: DatasetFile, config: Config) -> Iterator[str]:
    """Options that were given, but that the file gives everywhere itself."""
    levels = [(DATASET_KEYS, [(entry.table, file.general) for entry in file.datasets])]
    levels += [(SUBSET_KEYS, [(each, entry.table, file.general) for entry in file.datasets for each in entry.subsets])]
    for keys, places in levels:
        for key, option in keys.items():
            if config.changed(option) and all(any(t.value(key) is not None for t in tables) for tables in places):
                yield f"--{option} has no effect: {file.path.name} gives {key} for every dataset"


def without_repetitions(subsets: Sequence[SubsetSettings], report: Report) -> Iterator[SubsetSettings]:
    seen: set[tuple[Path, Path | None]] = set()
    for subset in subsets:
        which = (subset.metadata_file or subset.place).resolve(), subset.conditioning_data_dir
        if which in seen:
            report.no_effect(f"{subset.where} names {which[0].name} a second time in its dataset and is left out")
        elif subset.num_repeats == 0:
            report.note(f"{subset.where} has num_repeats 0 and is left out")
        else:
            yield subset
        seen.add(which)


def chosen(key: str, tables: Sequence[Table], config: Config) -> Any:
    """The first table that gives the key, else the option's value; a key without an option is None."""
    for table in tables:
        value = table.value(key)
        if value is not None:
            return value
    return config.value(OPTION_OF[key]) if key in OPTION_OF else None


def one_dataset(
    where: str,
    tables: Sequence[Table],
    subsets: Sequence[SubsetSettings],
    config: Config,
    bucket_step: int,
    report: Report,
) -> DatasetSettings:
    """UserError where the sizes contradict each other."""
    value = {name: chosen(name, tables, config) for name in DATASET_VALUES}
    name = f"{where}: " if where else ""
    if value["resolution"] is None:
        raise UserError(f"{name}no resolution is given", fix="give --resolution, as 512 or 512,768")
    multiplier = value["network_multiplier"]
    idle = {line: subset.where for subset in reversed(subsets) for line in idle_rules(subset)}
    for line, subset in idle.items():
        report.no_effect(f"{subset}: {line}")
    return DatasetSettings(
        where=where,
        batch_size=value["batch_size"],
        buckets=bucket_rule(name, value, bucket_step, report),
        network_multiplier=1.0 if multiplier is None else multiplier,
        skip_image_resolution=value["skip_image_resolution"],
        subsets=tuple(subsets),
    )


DATASET_VALUES = (
    "resolution",
    "batch_size",
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "bucket_no_upscale",
    "network_multiplier",
    "skip_image_resolution",
)


def bucket_rule(name: str, value: dict[str, Any], bucket_step: int, report: Report) -> Buckets:
    """The rule of one dataset, its limits brought to multiples of the step; UserError where it cannot hold."""
    resolution: Size = value["resolution"]
    step, shortest, longest = value["bucket_reso_steps"], value["min_bucket_reso"], value["max_bucket_reso"]
    if not value["enable_bucket"]:
        if value["bucket_no_upscale"] and name:  # the same on the command line is told by the configuration
            report.no_effect(f"{name}bucket_no_upscale has no effect without enable_bucket")
        tell_idle(
            name, value, ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"), "without enable_bucket", report
        )
        multiple = math.gcd(bucket_step, 16)  # a latent of even sides; buckets are coarser by custom only
        if any(side % multiple for side in resolution):
            near = ",".join(str(max(round(side / multiple), 1) * multiple) for side in resolution)
            size = f"{resolution[0]},{resolution[1]}"
            raise UserError(
                f"{name}resolution {size} is no multiple of {multiple}", fix=f"use {near}, or enable_bucket"
            )
        return Buckets(resolution=resolution, enabled=False, step=bucket_step)
    if step % bucket_step:
        raise UserError(
            f"{name}bucket_reso_steps is {step}, but this model needs a multiple of {bucket_step}",
            fix=f"set bucket_reso_steps to {-(-step // bucket_step) * bucket_step}",
        )
    if value["bucket_no_upscale"]:
        tell_idle(name, value, ("min_bucket_reso", "max_bucket_reso"), "with bucket_no_upscale", report)
        return Buckets(resolution=resolution, step=step, no_upscale=True)
    if shortest > longest:
        raise UserError(f"{name}min_bucket_reso {shortest} is above max_bucket_reso {longest}", fix="exchange the two")
    if min(resolution) < shortest:
        raise UserError(
            f"{name}resolution {min(resolution)} is below min_bucket_reso {shortest}", fix="lower the latter"
        )
    if max(resolution) > longest:
        raise UserError(
            f"{name}resolution {max(resolution)} is above max_bucket_reso {longest}", fix="raise the latter"
        )
    rounded = max(shortest // step, 1) * step, -(-longest // step) * step
    if rounded != (shortest, longest):
        report.note(f"{name}buckets go from {rounded[0]} to {rounded[1]} pixels, the nearest multiples of {step}")
    return Buckets(resolution=resolution, shortest=rounded[0], longest=rounded[1], step=step)


def tell_idle(name: str, value: Mapping[str, Any], keys: Sequence[str], because: str, report: Report) -> None:
    changed = [key for key in keys if value[key] != vocabulary()[OPTION_OF[key]].default]
    if changed:
        report.no_effect(f"{name}{', '.join(changed)}: no effect {because}")


def idle_rules(subset: SubsetSettings) -> Iterator[str]:
    """Options that need another one, or that nothing reads."""
    if subset.cache_info and not (subset.image_dir and (subset.image_dir / REMEMBERED).is_file()):
        yield "cache_info has no effect: what is found is always remembered, in the cache folder, and checked"
    for name in sorted(set(subset.custom_attributes) - {PRESERVE}):
        yield f"custom_attributes.{name} has no effect: nothing reads it"
    if subset.rules.keep_tokens and not subset.rules.changes_tags:
        yield "keep_tokens has no effect without shuffle_caption, token_warmup_step or caption_tag_dropout_rate"
    if subset.rules.token_warmup_min != 1 and not subset.rules.token_warmup_step:
        yield "token_warmup_min has no effect without token_warmup_step"


def one_subset(
    where: str, tables: Sequence[Table], config: Config, *, folder: FolderSubset | None = None
) -> SubsetSettings:
    """The settings of a subset; what its folder's name says goes before everything."""

    def value(key: str) -> Any:
        return chosen(key, tables, config)

    extension = value("caption_extension")
    rules = {each.name: value(each.name) for each in fields(CaptionRules)}
    is_reg = folder.is_reg if folder else bool(value("is_reg"))
    image_dir = folder.image_dir if folder else value("image_dir")
    attributes = value("custom_attributes") or {}
    given = next((table.value("metadata_file") for table in tables), None)  # --in_json is for runs without a file
    return SubsetSettings(
        where=where,
        image_dir=image_dir,
        metadata_file=given,
        conditioning_data_dir=None if is_reg else conditioning_of(value("conditioning_data_dir"), folder),
        is_reg=is_reg,
        class_tokens=folder.class_tokens if folder else value("class_tokens"),
        num_repeats=folder.num_repeats if folder and folder.num_repeats is not None else value("num_repeats"),
        caption_extension=extension if extension.startswith(".") else f".{extension}",
        cache_info=value("cache_info"),
        images=image_rules(value, config),
        validation_split=value("validation_split"),
        validation_seed=value("validation_seed"),
        custom_attributes=attributes,
        preserved=attributes.get(PRESERVE, is_reg and config.dataset.preserve_reg_images),
        rules=CaptionRules(**rules),
    )


def conditioning_of(root: Path | None, folder: FolderSubset | None) -> Path | None:
    """Where masks or control images lie: for a folder N_text in a folder of the same name, if there is one."""
    nested = root / folder.image_dir.name if root and folder else None
    return nested if nested and nested.is_dir() else root


def image_rules(value: Callable[[str], Any], config: Config) -> ImageRules:
    """What may happen to the pictures of a subset."""
    return ImageRules(
        **{name: value(name) for name in IMAGE_VALUES},
        masked_loss=config.images.masked_loss,
        whole_size=not value("enable_bucket"),
        cached=config.cache.cache_latents,
    )


IMAGE_VALUES = ("flip_aug", "color_aug", "random_crop", "face_crop_aug_range", "alpha_mask", "resize_interpolation")


@dataclass(frozen=True, kw_only=True)
class SubsetSettings:
    """One source of pictures and how they are used."""

    where: str  # for messages
    image_dir: Path | None
    is_reg: bool
    class_tokens: str | None
    num_repeats: int
    caption_extension: str
    conditioning_data_dir: Path | None  # masks or control images, one for each picture
    images: ImageRules
    validation_split: float
    validation_seed: int | None
    rules: CaptionRules
    metadata_file: Path | None = None
    dataset_class: str | None = None
    plugin_facts: Mapping[str, Any] = field(default_factory=dict)  # what such a class may ask for by name
    cache_info: bool = False
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    preserved: bool = False  # the target is what the model said before training

    @property
    def place(self) -> Path:
        """Where the pictures come from, for reports and metadata."""
        return self.metadata_file or self.image_dir or Path(self.dataset_class or "")


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """Subsets that share sizes and batches."""

    where: str
    batch_size: int
    buckets: Buckets
    network_multiplier: float
    skip_image_resolution: Size | None
    subsets: tuple[SubsetSettings, ...]

    @property
    def resolution(self) -> Size:
        return self.buckets.resolution
