"""What each dataset and subset is set to: subset before dataset before [general] before command line before default."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.config.dataset_toml import (
    DATASET_KEYS,
    OPTION_OF,
    SUBSET_KEYS,
    DatasetFile,
    Table,
    read_dataset_config,
)
from sfumato.config.schema import vocabulary
from sfumato.data.augment import ImageRules
from sfumato.data.buckets import Buckets, Size
from sfumato.data.captions import CaptionRules
from sfumato.data.folders import list_folder
from sfumato.errors import Problems, UserError

FOLDER_NAME = re.compile(r"(\d+)(?:_(.*))?")


def dataset_settings(config: Config, *, bucket_step: int, report: Report) -> list[DatasetSettings]:
    """The datasets of --dataset_config, or the one that --train_data_dir and --reg_data_dir make.

    Faults go to the report's problems; a dataset with a fault is left out of the result.
    """
    found: list[DatasetSettings] = []
    for where, tables, subsets in layouts(config, report):
        with report.problems.catch():
            found.append(one_dataset(where, tables, subsets, config, bucket_step, report))
    return found


def layouts(config: Config, report: Report) -> Iterator[tuple[str, tuple[Table, ...], list[SubsetSettings]]]:
    """(name for messages, the tables that hold for the whole dataset, its subsets)."""
    path = config.dataset.dataset_config
    if path is None:
        subsets = list(of_folders(config, report))
        if subsets:
            yield "", (), subsets
        return
    file = read_dataset_config(path)
    for line in overridden(file, config):
        report.no_effect(line)
    for i, entry in enumerate(file.datasets):
        where = f"{path}: datasets[{i}]"
        tables = (entry.table, file.general)
        subsets = [
            one_subset(f"{where}.subsets[{j}]", (subset, *tables), config) for j, subset in enumerate(entry.subsets)
        ]
        yield where, tables, list(without_repetitions(subsets, report))


def overridden(file: DatasetFile, config: Config) -> Iterator[str]:
    """Options that were given, but that the file gives everywhere itself."""
    levels = [(DATASET_KEYS, [(entry.table, file.general) for entry in file.datasets])]
    levels += [(SUBSET_KEYS, [(each, entry.table, file.general) for entry in file.datasets for each in entry.subsets])]
    for keys, places in levels:
        for key, option in keys.items():
            if config.changed(option) and all(any(t.value(key) is not None for t in tables) for tables in places):
                yield f"--{option} has no effect: {file.path.name} gives {key} for every dataset"


def without_repetitions(subsets: Sequence[SubsetSettings], report: Report) -> Iterator[SubsetSettings]:
    seen: set[Path] = set()
    for subset in subsets:
        folder = subset.image_dir.resolve()
        if folder in seen:
            report.no_effect(f"{subset.where} names {subset.image_dir} a second time in its dataset and is left out")
        elif subset.num_repeats == 0:
            report.note(f"{subset.where} has num_repeats 0 and is left out")
        else:
            yield subset
        seen.add(folder)


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
    """Caption options that need another one."""
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
    rules = {field.name: value(field.name) for field in fields(CaptionRules)}
    return SubsetSettings(
        where=where,
        image_dir=folder.image_dir if folder else value("image_dir"),
        is_reg=folder.is_reg if folder else bool(value("is_reg")),
        class_tokens=folder.class_tokens if folder else value("class_tokens"),
        num_repeats=folder.num_repeats if folder and folder.num_repeats is not None else value("num_repeats"),
        caption_extension=extension if extension.startswith(".") else f".{extension}",
        conditioning_data_dir=conditioning_data_dir(value("conditioning_data_dir"), bool(value("is_reg")), folder),
        images=image_rules(value, config),
        validation_split=value("validation_split"),
        validation_seed=value("validation_seed"),
        rules=CaptionRules(**rules),
    )


def conditioning_data_dir(root: Path | None, is_reg: bool, folder: FolderSubset | None) -> Path | None:
    """Where masks or control images lie: for a folder N_text in a folder of the same name, if there is one.

    Regularisation images have none.
    """
    if root is None or is_reg or (folder and folder.is_reg):
        return None
    nested = root / folder.image_dir.name if folder else root
    return nested if nested.is_dir() else root


def image_rules(value: Callable[[str], Any], config: Config) -> ImageRules:
    """What may happen to the pictures of a subset."""
    return ImageRules(
        **{name: value(name) for name in IMAGE_VALUES},
        masked_loss=config.images.masked_loss,
        whole_size=not value("enable_bucket"),
        cached=config.cache.cache_latents,
    )


IMAGE_VALUES = ("flip_aug", "color_aug", "random_crop", "face_crop_aug_range", "alpha_mask", "resize_interpolation")


def of_folders(config: Config, report: Report) -> Iterator[SubsetSettings]:
    for root, is_reg in ((config.dataset.train_data_dir, False), (config.dataset.reg_data_dir, True)):
        if root is None:
            continue
        option = "--reg_data_dir" if is_reg else "--train_data_dir"
        with report.problems.catch():
            found = folder_subsets(root, option, is_reg, report)
            if config.changed("dataset_repeats") and all(folder.num_repeats is not None for folder in found):
                report.no_effect("--dataset_repeats has no effect: the folders' names say how often to repeat")
            yield from (one_subset(str(folder.image_dir), (), config, folder=folder) for folder in found)


def folder_subsets(root: Path, option: str, is_reg: bool, report: Report) -> list[FolderSubset]:
    """The sub-folders named N_text, or the folder itself where the pictures lie directly in it.

    UserError, which says what was found instead, where there are neither; also where there are both.
    """
    listing = listed(root, option)
    named = {name: match for name in listing.folders if (match := FOLDER_NAME.fullmatch(name))}
    if named and listing.images:
        some = ", ".join(listing.images[:3])
        raise UserError(
            f"{option}: {root} has {len(listing.images)} pictures ({some}) beside the folder {next(iter(named))}",
            fix="move them into a folder named N_text, where N is how often to repeat them",
        )
    if not named and listing.images:
        match = FOLDER_NAME.fullmatch(root.resolve().name)
        report.note(f"{option}: the pictures lie in {root} itself, not in folders named N_text; it is taken as one")
        return [of_name(root, match, is_reg)]
    left_out = {name: len(listed(root / name, option).images) for name in listing.folders if name not in named}
    with_images = [f"{name} ({count} images)" for name, count in left_out.items() if count]
    if not named:
        raise nothing_in(root, option, with_images)
    if with_images:
        report.note(f"{option}: {', '.join(with_images)} left out: the name does not begin with a number of repeats")
    subsets = [of_name(root / name, match, is_reg) for name, match in named.items()]
    for subset in subsets:
        if subset.num_repeats == 0:
            report.note(f"{option}: {subset.image_dir.name} has 0 repeats and is left out")
    return [subset for subset in subsets if subset.num_repeats != 0]


def listed(folder: Path, option: str) -> Any:
    try:
        return list_folder(str(folder))
    except OSError as error:
        raise UserError(f"{option}: {folder} cannot be read ({error.strerror})", fix=f"check {option}") from error


def of_name(folder: Path, match: re.Match[str] | None, is_reg: bool) -> FolderSubset:
    repeats, text = (int(match[1]), match[2]) if match else (None, None)
    return FolderSubset(image_dir=folder, num_repeats=repeats, class_tokens=text or None, is_reg=is_reg)


def nothing_in(root: Path, option: str, with_images: list[str]) -> UserError:
    """The error for a folder without N_text folders and pictures, with what nearly matched."""
    if with_images:
        example = with_images[0].split(" (")[0]
        return UserError(
            f"{option}: no folder in {root} is named N_text, but there is {', '.join(with_images[:5])}",
            fix=f"rename it, as 10_{example} to see each picture 10 times an epoch",
        )
    return UserError(
        f"{option}: no pictures in {root}",
        fix="it must hold folders named N_text with the pictures in them, as 10_cat",
    )


@dataclass
class Report:
    """Where a stage tells what it noticed: faults to mend, and lines for the report before the first step."""

    problems: Problems
    strict: bool
    notes: list[str]

    def note(self, line: str) -> None:
        self.notes.append(line)

    def no_effect(self, line: str) -> None:
        """Something given has no effect; with --strict that is a fault."""
        if self.strict:
            self.problems.add(line, fix="leave it out")
        else:
            self.notes.append(line)


@dataclass(frozen=True, kw_only=True)
class FolderSubset:
    """What a folder named N_text says."""

    image_dir: Path
    num_repeats: int | None
    class_tokens: str | None
    is_reg: bool


@dataclass(frozen=True, kw_only=True)
class SubsetSettings:
    """One folder of pictures and how they are used."""

    where: str  # for messages
    image_dir: Path
    is_reg: bool
    class_tokens: str | None
    num_repeats: int
    caption_extension: str
    conditioning_data_dir: Path | None  # masks or control images, one for each picture
    images: ImageRules
    validation_split: float
    validation_seed: int | None
    rules: CaptionRules


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
