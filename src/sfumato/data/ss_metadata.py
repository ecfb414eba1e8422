"""The ss_ metadata of a run's data, as sd-scripts writes it into LoRA files; names of folders only, never paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from sfumato.data.find.settings import SubsetSettings
from sfumato.data.plans import DataPlan, DatasetPlan, SubsetPlan

CAPTION_OPTIONS = (
    "shuffle_caption",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
)


def build_ss_metadata(plan: DataPlan) -> dict[str, Any]:
    """ss_ key -> value, as Python objects; lists and dictionaries become JSON when the file is written.

    With a dataset file: ss_datasets, ss_tag_frequency, ss_dataset_dirs. Otherwise the flat keys of the one dataset.
    """
    counts = {
        "ss_num_train_images": plan.num_train_images,
        "ss_num_validation_images": plan.num_validation_images,
        "ss_num_reg_images": plan.num_reg_images,
        "ss_num_batches_per_epoch": plan.batches_per_epoch,
    }
    if plan.from_file:
        return counts | {
            "ss_datasets": [build_dataset_entry(dataset) for dataset in plan.datasets],
            "ss_tag_frequency": count_tags_by_folder(plan),
            "ss_dataset_dirs": count_folder_images(plan, is_reg=False, number_duplicates=True),
        }
    assert len(plan.datasets) == 1, "without a dataset file there is one dataset"
    return counts | build_flat_keys(plan, plan.datasets[0])


def build_dataset_entry(dataset: DatasetPlan) -> dict[str, Any]:
    """One entry of ss_datasets."""
    buckets = dataset.settings.buckets
    return {
        "is_dreambooth": not any(subset.settings.metadata_file for subset in dataset.subsets),
        "batch_size_per_device": dataset.settings.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": list(dataset.settings.resolution),
        "enable_bucket": buckets.enabled,
        "min_bucket_reso": buckets.shortest if has_side_limits(dataset) else None,
        "max_bucket_reso": buckets.longest if has_side_limits(dataset) else None,
        "tag_frequency": {subset.settings.source.name: count_tags(subset) for subset in dataset.subsets},
        "bucket_info": build_bucket_info(dataset),
        "resize_interpolation": find_common(subset.settings.images.resize_interpolation for subset in dataset.subsets),
        "subsets": [build_subset_entry(subset) for subset in dataset.subsets],
    }


def build_subset_entry(subset: SubsetPlan) -> dict[str, Any]:
    settings = subset.settings
    return {
        "img_count": len(subset.items),
        "num_repeats": settings.num_repeats,
        "color_aug": settings.images.color_aug,
        "flip_aug": settings.images.flip_aug,
        "random_crop": settings.images.random_crop,
        **{name: vars(settings.rules)[name] for name in CAPTION_OPTIONS},
        "resize_interpolation": settings.images.resize_interpolation,
        **({"image_dir": settings.image_dir.name} if settings.image_dir else {}),
        **build_source_keys(settings),
    }


def build_source_keys(settings: SubsetSettings) -> dict[str, Any]:
    if settings.metadata_file is not None:
        return {"metadata_file": settings.metadata_file.name}
    return {"class_tokens": settings.class_tokens, "is_reg": settings.is_reg}


def build_flat_keys(plan: DataPlan, dataset: DatasetPlan) -> dict[str, Any]:
    """The keys of a run without a dataset file."""
    rules = dataset.subsets[0].settings.rules
    buckets = dataset.settings.buckets
    return {
        "ss_batch_size_per_device": dataset.settings.batch_size,
        "ss_total_batch_size": dataset.settings.batch_size * plan.processes,
        "ss_resolution": str(dataset.settings.resolution),
        "ss_color_aug": any(subset.settings.images.color_aug for subset in dataset.subsets),
        "ss_flip_aug": any(subset.settings.images.flip_aug for subset in dataset.subsets),
        "ss_random_crop": any(subset.settings.images.random_crop for subset in dataset.subsets),
        "ss_shuffle_caption": rules.shuffle_caption,
        "ss_enable_bucket": buckets.enabled,
        "ss_bucket_no_upscale": buckets.no_upscale,
        "ss_min_bucket_reso": buckets.shortest if has_side_limits(dataset) else None,
        "ss_max_bucket_reso": buckets.longest if has_side_limits(dataset) else None,
        "ss_keep_tokens": rules.keep_tokens,
        "ss_dataset_dirs": count_folder_images(plan, is_reg=False),
        "ss_reg_dataset_dirs": count_folder_images(plan, is_reg=True),
        "ss_tag_frequency": count_tags_by_folder(plan),
        "ss_bucket_info": build_bucket_info(dataset),
    }


def has_side_limits(dataset: DatasetPlan) -> bool:
    """Whether min_bucket_reso and max_bucket_reso have an effect."""
    return dataset.settings.buckets.enabled and not dataset.settings.buckets.no_upscale


def build_bucket_info(dataset: DatasetPlan) -> dict[str, Any] | None:
    """Sizes and samples of the buckets; None without buckets."""
    if not dataset.settings.buckets.enabled:
        return None
    buckets = {
        str(i): {"resolution": list(size), "count": count} for i, (size, count) in enumerate(dataset.buckets.items())
    }
    return {"buckets": buckets, "mean_img_ar_error": dataset.mean_aspect_error}


def count_folder_images(plan: DataPlan, *, is_reg: bool, number_duplicates: bool = False) -> dict[str, dict[str, int]]:
    """Folder name -> repeats and number of images.

    number_duplicates: the second folder of a name becomes "name (2)"; otherwise the last one replaces the others.
    """
    counts: dict[str, dict[str, int]] = {}
    for subset in iterate_subsets(plan):
        if subset.settings.is_reg == is_reg:
            name = subset.settings.source.name
            duplicates = sum(other == name or other.startswith(f"{name} (") for other in counts)
            name = f"{name} ({duplicates + 1})" if number_duplicates and duplicates else name
            counts[name] = {"n_repeats": subset.settings.num_repeats, "img_count": len(subset.items)}
    return counts


def count_tags_by_folder(plan: DataPlan) -> dict[str, dict[str, int]]:
    """Folder name -> tag -> number of captions with it; a folder that several datasets use counts once."""
    counts: dict[str, dict[str, int]] = {}
    seen = set()
    for subset in iterate_subsets(plan):
        folder = subset.settings.source.resolve()
        if folder not in seen:
            merged = Counter(counts.get(folder.name, {}))
            merged.update(count_tags(subset))
            counts[folder.name] = dict(merged)
        seen.add(folder)
    return counts


def count_tags(subset: SubsetPlan) -> dict[str, int]:
    """Lowercase tags, separated by commas whatever the caption_separator, like sd-scripts counts them."""
    counts: Counter[str] = Counter()
    for caption in subset.items.images.captions:
        counts.update(tag.strip().lower() for tag in caption.split(",") if tag.strip())
    return dict(counts)


def iterate_subsets(plan: DataPlan) -> Iterator[SubsetPlan]:
    for dataset in plan.datasets:
        yield from dataset.subsets


def find_common(values: Iterator[str | None]) -> str | None:
    """The value that all of them have, else None."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
