"""The data of a run in the words that the field's LoRA files carry; names of folders only, never paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from sfumato.data.find.settings import SubsetSettings
from sfumato.data.plans import DataPlan, DatasetPlan, SubsetPlan

SUBSET_RULES = (
    "shuffle_caption",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
)


def metadata(plan: DataPlan) -> dict[str, Any]:
    """Values by their ss_ key, as Python objects; whoever writes the file makes JSON of lists and dictionaries.

    With a dataset file: ss_datasets, ss_tag_frequency, ss_dataset_dirs. Without: the flat keys of its one dataset.
    """
    counts = {
        "ss_num_train_images": plan.num_train_images,
        "ss_num_validation_images": plan.num_validation_images,
        "ss_num_reg_images": plan.num_reg_images,
        "ss_num_batches_per_epoch": plan.batches_per_epoch,
    }
    if plan.from_file:
        return counts | {
            "ss_datasets": [of_dataset(dataset) for dataset in plan.datasets],
            "ss_tag_frequency": tag_frequencies(plan),
            "ss_dataset_dirs": folders(plan, is_reg=False, apart=True),
        }
    assert len(plan.datasets) == 1, "without a dataset file there is one dataset"
    return counts | of_folders(plan, plan.datasets[0])


def of_dataset(dataset: DatasetPlan) -> dict[str, Any]:
    """One entry of ss_datasets."""
    buckets = dataset.settings.buckets
    return {
        "is_dreambooth": not any(subset.settings.metadata_file for subset in dataset.subsets),
        "batch_size_per_device": dataset.settings.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": list(dataset.settings.resolution),
        "enable_bucket": buckets.enabled,
        "min_bucket_reso": buckets.shortest if limited(dataset) else None,
        "max_bucket_reso": buckets.longest if limited(dataset) else None,
        "tag_frequency": {subset.settings.place.name: tags(subset) for subset in dataset.subsets},
        "bucket_info": bucket_info(dataset),
        "resize_interpolation": common(subset.settings.images.resize_interpolation for subset in dataset.subsets),
        "subsets": [of_subset(subset) for subset in dataset.subsets],
    }


def of_subset(subset: SubsetPlan) -> dict[str, Any]:
    settings = subset.settings
    return {
        "img_count": len(subset.items),
        "num_repeats": settings.num_repeats,
        "color_aug": settings.images.color_aug,
        "flip_aug": settings.images.flip_aug,
        "random_crop": settings.images.random_crop,
        **{name: vars(settings.rules)[name] for name in SUBSET_RULES},
        "resize_interpolation": settings.images.resize_interpolation,
        **({"image_dir": settings.image_dir.name} if settings.image_dir else {}),
        **of_kind(settings),
    }


def of_kind(settings: SubsetSettings) -> dict[str, Any]:
    if settings.metadata_file is not None:
        return {"metadata_file": settings.metadata_file.name}
    return {"class_tokens": settings.class_tokens, "is_reg": settings.is_reg}


def of_folders(plan: DataPlan, dataset: DatasetPlan) -> dict[str, Any]:
    """The flat keys of a run without a dataset file."""
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
        "ss_min_bucket_reso": buckets.shortest if limited(dataset) else None,
        "ss_max_bucket_reso": buckets.longest if limited(dataset) else None,
        "ss_keep_tokens": rules.keep_tokens,
        "ss_dataset_dirs": folders(plan, is_reg=False, apart=False),
        "ss_reg_dataset_dirs": folders(plan, is_reg=True, apart=False),
        "ss_tag_frequency": tag_frequencies(plan),
        "ss_bucket_info": bucket_info(dataset),
    }


def limited(dataset: DatasetPlan) -> bool:
    """Whether the limits of bucket sides have an effect."""
    return dataset.settings.buckets.enabled and not dataset.settings.buckets.no_upscale


def bucket_info(dataset: DatasetPlan) -> dict[str, Any] | None:
    """Sizes and samples of the buckets, None where there are none."""
    if not dataset.settings.buckets.enabled:
        return None
    buckets = {
        str(i): {"resolution": list(size), "count": count} for i, (size, count) in enumerate(dataset.buckets.items())
    }
    return {"buckets": buckets, "mean_img_ar_error": dataset.mean_aspect_error}


def folders(plan: DataPlan, *, is_reg: bool, apart: bool) -> dict[str, dict[str, int]]:
    """Folder name -> repeats and number of images. apart: a name used again gets a number, else the last one counts."""
    found: dict[str, dict[str, int]] = {}
    for subset in subsets(plan):
        if subset.settings.is_reg == is_reg:
            name = subset.settings.place.name
            same = sum(each == name or each.startswith(f"{name} (") for each in found)
            name = f"{name} ({same + 1})" if apart and same else name
            found[name] = {"n_repeats": subset.settings.num_repeats, "img_count": len(subset.items)}
    return found


def tag_frequencies(plan: DataPlan) -> dict[str, dict[str, int]]:
    """Folder name -> tag -> captions that have it; a folder that several datasets use counts once."""
    found: dict[str, dict[str, int]] = {}
    seen = set()
    for subset in subsets(plan):
        place = subset.settings.place.resolve()
        if place not in seen:
            merged = Counter(found.get(place.name, {}))
            merged.update(tags(subset))
            found[place.name] = dict(merged)
        seen.add(place)
    return found


def tags(subset: SubsetPlan) -> dict[str, int]:
    """Lower-cased tags, separated by commas whatever the caption_separator: as other programs read them."""
    counts: Counter[str] = Counter()
    for caption in subset.items.pictures.captions:
        counts.update(tag.strip().lower() for tag in caption.split(",") if tag.strip())
    return dict(counts)


def subsets(plan: DataPlan) -> Iterator[SubsetPlan]:
    for dataset in plan.datasets:
        yield from dataset.subsets


def common(values: Iterator[str | None]) -> str | None:
    """The one value that all share, else None."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
