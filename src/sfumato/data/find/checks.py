"""Image options that contradict the cache, the buckets or the masks, and options without an effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sfumato.data.augment import parse_face
from sfumato.data.find.findings import Findings
from sfumato.data.find.settings import SubsetSettings
from sfumato.data.find.tar_source import is_archive_path
from sfumato.data.plans import DataPlan, SubsetPlan
from sfumato.errors import UserError


def check_image_options(
    plan: DataPlan, *, masked_loss: bool, outside_mask: bool, control: bool, findings: Findings
) -> None:
    """Check every subset's image options against the cache, the buckets and the images.

    masked_loss: conditioning images are masks. outside_mask: the loss outside of masks counts, too. control: the method
    takes conditioning images as control images.
    """
    subsets: list[SubsetPlan] = []
    for dataset in plan.datasets:
        subsets += dataset.subsets
    for subset in subsets:
        for name in subset.settings.images.uncacheable_options:
            findings.problems.add(
                f"{subset.settings.where}: {name} changes the image at every step, but cache_latents encodes it once",
                code="augmentation-with-latent-cache",
                fix=f"remove {name} or --cache_latents",
            )
        for line in list_ineffective_options(subset):
            findings.report_no_effect(f"{subset.settings.where}: {line}")
        if subset.settings.conditioning_data_dir is not None and not (masked_loss or control):
            findings.problems.add(
                f"{subset.settings.where}: the images of conditioning_data_dir would not be used",
                code="conditioning-images-unused",
                fix="give --masked_loss, which uses them as masks, or remove conditioning_data_dir",
            )
        if subset.settings.conditioning_data_dir is None and control:
            findings.problems.add(
                f"{subset.settings.where}: its images have no control images",
                code="control-images-missing",
                fix="give --conditioning_data_dir, a folder with a control image of each image's name",
            )
    if masked_loss:
        check_masks(subsets, findings)
    if outside_mask and not any(has_masks(subset) for subset in subsets):
        findings.problems.add(
            "--masked_prior_preservation_weight applies outside of masks, and no image has a mask",
            code="prior-preservation-without-masks",
            fix="give --alpha_mask, or --masked_loss with --conditioning_data_dir",
        )


def list_ineffective_options(subset: SubsetPlan) -> Iterator[str]:
    """Options without an effect on any image of the subset."""
    rules = subset.settings.images
    images = subset.items.images
    if rules.face_crop_aug_range is not None:
        if not rules.full_size:
            yield "face_crop_aug_range has no effect with enable_bucket, which crops each image to its bucket"
        elif rules.cached:
            yield "face_crop_aug_range has no effect with cache_latents, which encodes each image once"
        elif all(parse_face(path) is None for path in images.paths()):
            yield "face_crop_aug_range has no effect: no file name ends in a face, e.g. name_200_180_64_80.png"
    if rules.random_crop and all(item.choice.resized == item.choice.bucket for item in subset.items):
        if not rules.full_size or all(item.size == item.choice.bucket for item in subset.items):
            yield "random_crop has no effect: no image is larger than its crop"
    if rules.alpha_mask and rules.masked_loss and subset.settings.conditioning_data_dir is not None:
        yield "alpha_mask has no effect: conditioning_data_dir gives the masks"


def check_masks(subsets: Sequence[SubsetPlan], findings: Findings) -> None:
    """Report --masked_loss without any mask, and a subset without masks among others."""
    unmasked = [subset.settings for subset in subsets if not has_masks(subset)]
    if len(unmasked) == len(subsets):
        findings.report_no_effect("--masked_loss has no effect: no subset has conditioning_data_dir or alpha_mask")
        return
    for settings in unmasked:
        findings.note(f"{settings.where}: no masks, so the loss covers the full area of its images")


def has_masks(subset: SubsetPlan) -> bool:
    settings = subset.settings
    return settings.images.alpha_mask or (settings.images.masked_loss and settings.conditioning_data_dir is not None)


def refuse_cache_among_images(subsets: Sequence[SubsetSettings], cache_dir: Path) -> None:
    """Raise UserError where the cache lies in a folder of images."""
    cache = cache_dir.resolve()
    for subset in subsets:
        for folder in (subset.image_dir, subset.conditioning_data_dir, *subset.reference_data_dirs):
            if folder is None:
                continue
            if is_archive_path(folder):
                inside = cache == folder.parent.resolve()
            else:
                inside = cache.is_relative_to(folder.resolve())
            if inside:
                raise UserError(
                    f"--cache_dir {cache_dir} is inside the image folder {folder}, where nothing is ever written",
                    code="cache-dir-among-images",
                    fix="give another --cache_dir, or remove the option",
                )
