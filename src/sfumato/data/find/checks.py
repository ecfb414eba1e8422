"""What is asked of the pictures and cannot be done, and what changes nothing about them."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.data.augment import face_of
from sfumato.data.find.report import Report
from sfumato.data.plans import DataPlan, SubsetPlan

WITHOUT_ALPHA = (".jpg", ".jpeg", ".bmp")


def check_pictures(plan: DataPlan, *, masked_loss: bool, outside_mask: bool, control: bool, report: Report) -> None:
    """Every subset's image options, against the cache, the buckets and the pictures themselves.

    masked_loss: conditioning images are masks; outside_mask: what lies outside of masks counts, too; control: the
    method takes conditioning images as control images.
    """
    subsets = [subset for dataset in plan.datasets for subset in dataset.subsets]
    for subset in subsets:
        for name in subset.settings.images.not_cacheable:
            report.problems.add(
                f"{subset.settings.where}: {name} changes the picture at every step, and cache_latents encodes it once",
                fix=f"leave out {name} or the cache",
            )
        for line in idle_rules(subset):
            report.no_effect(f"{subset.settings.where}: {line}")
        if subset.settings.conditioning_data_dir is not None and not (masked_loss or control):
            report.problems.add(
                f"{subset.settings.where}: the images of conditioning_data_dir would not be used",
                fix="give --masked_loss, which takes them as masks, or leave it out",
            )
    if masked_loss:
        check_masks(subsets, report)
    if outside_mask and not any(masked(subset) for subset in subsets):
        report.problems.add(
            "--masked_prior_preservation_weight is for what masks leave out, and no picture has a mask",
            fix="give --alpha_mask, or --masked_loss with --conditioning_data_dir",
        )


def idle_rules(subset: SubsetPlan) -> Iterator[str]:
    """Options without an effect on any of the subset's pictures."""
    rules = subset.settings.images
    if rules.face_crop_aug_range is not None:
        if not rules.whole_size:
            yield "face_crop_aug_range has no effect with enable_bucket, which crops each picture to its bucket"
        elif rules.cached:
            yield "face_crop_aug_range has no effect with cache_latents, which encodes each picture once"
        elif all(face_of(item.picture.path) is None for item in subset.items):
            yield "face_crop_aug_range has no effect: no file name ends in a face, as in name_200_180_64_80.png"
    if rules.random_crop and all(item.choice.resized == item.choice.bucket for item in subset.items):
        if not rules.whole_size or all(item.size == item.choice.bucket for item in subset.items):
            yield "random_crop has no effect: nothing of any picture is cropped away"
    if rules.alpha_mask and rules.masked_loss and subset.settings.conditioning_data_dir is not None:
        yield "alpha_mask has no effect beside mask images"
    elif rules.alpha_mask and all(item.picture.path.lower().endswith(WITHOUT_ALPHA) for item in subset.items):
        yield "alpha_mask has no effect: images of these formats have no alpha channel"


def check_masks(subsets: list[SubsetPlan], report: Report) -> None:
    """--masked_loss without any mask is a fault; a subset without masks beside others is told."""
    plain = [subset.settings for subset in subsets if not masked(subset)]
    if len(plain) == len(subsets):
        report.problems.add(
            "--masked_loss has no masks: no subset has conditioning_data_dir or alpha_mask",
            fix="give --conditioning_data_dir or --alpha_mask",
        )
        return
    for settings in plain:
        report.note(f"{settings.where}: no masks, so every part of its pictures counts fully")


def masked(subset: SubsetPlan) -> bool:
    settings = subset.settings
    return settings.images.alpha_mask or (settings.images.masked_loss and settings.conditioning_data_dir is not None)
