"""The settings of each dataset and subset.

Precedence: subset, dataset, [general], command line, default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sfumato.common.text import add_dot, has_lone_surrogate
from sfumato.config import Config
from sfumato.config.concepts import Concept
from sfumato.config.dataset_toml import (
    DATASET_KEYS,
    OFFSET_KEY,
    OPTION_OF_KEY,
    PRESERVATION_KEY,
    SUBSET_KEYS,
    TIMESTEP_KEY,
    DatasetFile,
    Table,
    read_dataset_config,
)
from sfumato.data.augment import ImageRules
from sfumato.data.buckets import Buckets, Size
from sfumato.data.caption_templates import make_template_captions
from sfumato.data.captions import CaptionRules
from sfumato.data.find.bucket_settings import SizeSteps, make_buckets
from sfumato.data.find.findings import Findings
from sfumato.data.find.folder_layout import FolderSubset, list_folder_subsets
from sfumato.errors import UserError

Tables = tuple[Table, ...]
METADATA_CACHE_NAME = "metadata_cache.json"  # what sd-scripts writes with cache_info
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
IMAGE_VALUES = ("flip_aug", "color_aug", "random_crop", "face_crop_aug_range", "alpha_mask", "resize_interpolation")


def load_dataset_settings(
    config: Config, *, steps: SizeSteps, findings: Findings
) -> list[tuple[DatasetSettings | None, list[SubsetSettings]]]:
    """The datasets of --dataset_config, or the one that the options make, each with its subsets.

    None for a dataset with a problem, whose subsets can still be checked.
    """
    datasets: list[tuple[DatasetSettings | None, list[SubsetSettings]]] = []
    for where, tables, subsets in read_datasets(config, findings):
        settings = None
        with findings.problems.catch():
            settings = make_dataset_settings(where, tables, subsets, config, steps, findings)
        datasets.append((settings, subsets))
    return datasets


def read_datasets(config: Config, findings: Findings) -> Iterator[tuple[str, Tables, list[SubsetSettings]]]:
    """(name for messages, the tables that apply to the dataset, its subsets)."""
    path = config.dataset.dataset_config
    if config.dataset.dataset_class is not None or path is None:
        subsets = list(make_option_subsets(config, findings))
        if subsets:
            yield "", (), subsets
        return
    file = read_dataset_config(path, findings.problems)
    if file is None:
        return
    for line in list_overridden_options(file, config):
        findings.report_no_effect(line)
    for i, entry in enumerate(file.datasets):
        where = f"{path}: datasets[{i}]"
        tables = (entry.table, file.general)
        subsets = [
            make_subset_settings(f"{where}.subsets[{j}]", (subset, *tables), config)
            for j, subset in enumerate(entry.subsets)
            if j not in entry.faulty_subsets and (subset.value("image_dir") or subset.value("metadata_file"))
        ]
        if subsets and entry.is_valid:
            yield where, tables, list(drop_unused_subsets(subsets, findings))


def make_option_subsets(config: Config, findings: Findings) -> Iterator[SubsetSettings]:
    """The subsets that the options make without a dataset file."""
    options = config.dataset
    if options.dataset_class is not None:
        yield replace(
            make_subset_settings(f"--dataset_class {options.dataset_class}", (), config),
            dataset_class=options.dataset_class,
            class_arguments={
                "resolution": config.buckets.resolution,
                "max_token_length": config.model.max_token_length,
                "debug_dataset": options.debug_dataset,
                "seed": config.loop.seed,
            },
        )
    elif options.in_json is not None:
        subset = make_subset_settings(f"--in_json {options.in_json}", (), config)
        yield replace(subset, metadata_file=options.in_json, image_dir=options.train_data_dir)
    else:
        for folder in list_folder_subsets(config, findings):
            yield make_subset_settings(str(folder.image_dir), (), config, folder=folder)


def list_overridden_options(file: DatasetFile, config: Config) -> Iterator[str]:
    """A line for each option that was given, but that the file overrides for every dataset."""
    dataset_tables: list[Tables] = []
    subset_tables: list[Tables] = []
    for entry in file.datasets:
        dataset_tables.append((entry.table, file.general))
        subset_tables += [(subset, entry.table, file.general) for subset in entry.subsets]
    for keys, levels in ((DATASET_KEYS, dataset_tables), (SUBSET_KEYS, subset_tables)):
        for key, option in keys.items():
            if config.is_changed(option) and all(has_value(key, tables) for tables in levels):
                yield f"--{option} has no effect: {file.path.name} gives {key} for every dataset"


def has_value(key: str, tables: Tables) -> bool:
    return any(table.value(key) is not None for table in tables)


def drop_unused_subsets(subsets: Sequence[SubsetSettings], findings: Findings) -> Iterator[SubsetSettings]:
    """Without the subsets that repeat an earlier one and those with 0 repeats."""
    seen: set[tuple[Path, Path | None, tuple[Path, ...]]] = set()
    for subset in subsets:
        identity = subset.source.resolve(), subset.conditioning_data_dir, subset.reference_data_dirs
        if identity in seen:
            findings.report_no_effect(
                f"{subset.where} is skipped: it names {identity[0].name} a second time in its dataset"
            )
        elif subset.num_repeats == 0:
            findings.note(f"{subset.where} is skipped: num_repeats is 0")
        else:
            yield subset
        seen.add(identity)


def choose_value(key: str, tables: Sequence[Table], config: Config) -> Any:
    """From the first table that gives the key, else the option's value; None for a key without an option."""
    for table in tables:
        value = table.value(key)
        if value is not None:
            return value
    return config.value(OPTION_OF_KEY[key]) if key in OPTION_OF_KEY else None


def is_given(key: str, tables: Sequence[Table], config: Config) -> bool:
    """Whether a key has a value that somebody chose, be it the default's."""
    return any(table.value(key) is not None for table in tables) or config.source(key) not in ("default", "launcher")


def make_dataset_settings(
    where: str,
    tables: Sequence[Table],
    subsets: Sequence[SubsetSettings],
    config: Config,
    steps: SizeSteps,
    findings: Findings,
) -> DatasetSettings:
    """UserError where sizes are missing or contradict each other."""
    values = {name: choose_value(name, tables, config) for name in DATASET_VALUES}
    prefix = f"{where}: " if where else ""
    if values["resolution"] is None:
        raise UserError(
            f"{prefix}no resolution is given", code="dataset-resolution-missing", fix="e.g. --resolution 512 or 512,768"
        )
    report_unread_options(subsets, findings)
    multiplier = values["network_multiplier"]
    return DatasetSettings(
        where=where,
        batch_size=values["batch_size"],
        buckets=make_buckets(prefix, values, steps, findings),
        network_multiplier=1.0 if multiplier is None else multiplier,
        skip_image_resolution=values["skip_image_resolution"],
        subsets=tuple(subsets),
    )


def report_unread_options(subsets: Sequence[SubsetSettings], findings: Findings) -> None:
    """Each line once, for the first subset that it applies to."""
    first_subset: dict[str, str] = {}
    for subset in reversed(subsets):
        for line in list_unread_options(subset):
            first_subset[line] = subset.where
    for line, where in first_subset.items():
        findings.report_no_effect(f"{where}: {line}")


def list_unread_options(subset: SubsetSettings) -> Iterator[str]:
    """Options that need another one, or that nothing reads."""
    if subset.cache_info and not (subset.image_dir and (subset.image_dir / METADATA_CACHE_NAME).is_file()):
        yield "cache_info has no effect: sizes and captions are always stored in the cache folder and checked"
    for name in sorted(set(subset.custom_attributes) - {PRESERVATION_KEY, TIMESTEP_KEY}):
        yield f"custom_attributes.{name} has no effect: nothing reads it"
    if subset.rules.changes_tags and not subset.rules.caption_separator:
        yield "caption_separator is empty, which separates no tags; commas do"
    if subset.rules.keep_tokens and not subset.rules.changes_tags:
        yield "keep_tokens has no effect without shuffle_caption, token_warmup_step or caption_tag_dropout_rate"
    if subset.rules.token_warmup_min != 1 and not subset.rules.token_warmup_step:
        yield "token_warmup_min has no effect without token_warmup_step"


def make_subset_settings(
    where: str, tables: Sequence[Table], config: Config, *, folder: FolderSubset | None = None
) -> SubsetSettings:
    """The settings of a subset; what its folder's name gives takes precedence over everything."""

    def value(key: str) -> Any:
        return choose_value(key, tables, config)

    extension = value("caption_extension")
    rules = {rule.name: value(rule.name) for rule in fields(CaptionRules) if rule.name != "templates"}
    is_reg = folder.is_reg if folder else bool(value("is_reg"))
    templates = () if is_reg else make_template_captions(config.embedding)
    attributes = value("custom_attributes") or {}
    metadata_file = next((table.value("metadata_file") for table in tables), None)  # --in_json needs no dataset file
    class_tokens = folder.class_tokens if folder else value("class_tokens")
    conditioning = value("conditioning_data_dir")
    check_texts(where, {**rules, "class_tokens": class_tokens})
    return SubsetSettings(
        where=where,
        image_dir=folder.image_dir if folder else value("image_dir"),
        metadata_file=metadata_file,
        conditioning_data_dir=None if is_reg or not conditioning else choose_partner_dir(conditioning, folder),
        reference_data_dirs=choose_reference_dirs(value("reference_data_dirs"), folder),
        is_reg=is_reg,
        class_tokens=class_tokens,
        num_repeats=folder.num_repeats if folder and folder.num_repeats is not None else value("num_repeats"),
        caption_extension=add_dot(extension),
        caption_extension_given=is_given("caption_extension", tables, config),
        cache_info=value("cache_info"),
        images=make_image_rules(value, config),
        validation_split=value("validation_split"),
        validation_seed=value("validation_seed"),
        custom_attributes=attributes,
        timestep_offset=float(attributes.get(TIMESTEP_KEY, {}).get(OFFSET_KEY, 0)),
        preserved=attributes.get(PRESERVATION_KEY, is_reg and config.dataset.preserve_reg_images),
        rules=CaptionRules(**rules, templates=templates),
    )


def check_texts(where: str, texts: Mapping[str, Any]) -> None:
    """UserError where what becomes part of captions is no text that a tokenizer can take."""
    for name, text in texts.items():
        if isinstance(text, str) and has_lone_surrogate(text):
            raise UserError(
                f"{where or 'the dataset'}: {name} is {text!r}, whose letters are not UTF-8",
                code="caption-option-not-utf8",
                fix="write it in UTF-8; of folders named N_text, rename the folder",
            )


def choose_partner_dir(root: Path, folder: FolderSubset | None) -> Path:
    """A folder of further images of a subset; for a folder N_text the subfolder of that name, if there is one."""
    nested = root / folder.image_dir.name if folder else None
    return nested if nested and nested.is_dir() else root


def choose_reference_dirs(roots: Sequence[Path], folder: FolderSubset | None) -> tuple[Path, ...]:
    """Regularization images of --reg_data_dir have no reference images."""
    return () if folder and folder.is_reg else tuple(choose_partner_dir(root, folder) for root in roots)


def make_image_rules(value: Callable[[str], Any], config: Config) -> ImageRules:
    """What may be done to the images of a subset."""
    return ImageRules(
        **{name: value(name) for name in IMAGE_VALUES},
        masked_loss=config.images.masked_loss,
        full_size=not value("enable_bucket"),
        cached=config.cache.cache_latents,
    )


@dataclass(frozen=True, kw_only=True)
class SubsetSettings:
    """One source of images and how they are used."""

    where: str  # for messages
    image_dir: Path | None
    is_reg: bool
    class_tokens: str | None
    num_repeats: int
    caption_extension: str
    caption_extension_given: bool  # no other one is tried then
    conditioning_data_dir: Path | None  # masks or control images, one per image
    reference_data_dirs: tuple[Path, ...]  # reference images, in each folder one per image
    images: ImageRules
    validation_split: float
    validation_seed: int | None
    rules: CaptionRules
    metadata_file: Path | None = None
    dataset_class: str | None = None
    class_arguments: Mapping[str, Any] = field(default_factory=dict)  # what a dataset class may take by name
    cache_info: bool = False
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    concept: Concept | None = None  # what is trained in the place of images
    timestep_offset: float = 0.0  # in standard deviations of a normal number, towards more noise
    preserved: bool = False  # whether the target is the output of the model before training

    @property
    def source(self) -> Path:
        """Where the images come from, for reports and metadata."""
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
