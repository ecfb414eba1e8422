"""Finds the data of a run before torch is imported: images, captions, buckets, batches."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from sfumato.config import Config
from sfumato.data.find.checks import check_image_options, refuse_cache_among_images
from sfumato.data.find.dataset_plan import plan_dataset
from sfumato.data.find.findings import Findings
from sfumato.data.find.image_table import ImageTable
from sfumato.data.find.index import cache_folder, check_cache_folder
from sfumato.data.find.partner_images import attach_partner_images, check_unmatched_images
from sfumato.data.find.policy import Policy
from sfumato.data.find.settings import SizeSteps, SubsetSettings, load_dataset_settings
from sfumato.data.find.subset_images import load_subset_images
from sfumato.data.find.verify_images import refuse_undecodable
from sfumato.data.plans import DataPlan, DatasetPlan
from sfumato.data.split import check_validation_split, choose_validation_seed, refuse_overlap
from sfumato.data.variants import describe_variants, refuse_varying
from sfumato.errors import Problems


def find_data(
    config: Config,
    *,
    bucket_step: int,
    size_step: int | None = None,
    processes: int = 1,
    decoding: bool = True,
    remember: bool = True,
    problems: Problems,
) -> DataPlan:
    """Read all image folders and plan what is trained at which size and how often.

    bucket_step: bucket sides in pixels must be multiples of it. size_step: the same without buckets; by default 16, or
    what it shares with bucket_step. processes: batches are formed over all of them. decoding: whether images may be
    decoded, once each: all of them where --on_bad_image skip is given, else some first ones and some with an alpha
    channel. remember: whether the dataset index in the cache folder is written; nothing else ever is.
    Every fault is added to `problems`; the plan is complete only if there are none.
    """
    faults_before = len(problems.found)
    if config.run.takes_control:  # so that no conditioning image is read as a mask
        config = config.with_values({"masked_loss": False})
    findings = Findings(problems=problems, strict=config.log.strict, notes=[])
    policy = Policy(
        on_missing_caption=config.dataset.on_missing_caption,
        on_bad_image=config.dataset.on_bad_image,
        cache_dir=cache_folder(config),
        may_decode=decoding,
        decoding=decoding and config.dataset.on_bad_image == "skip",
        remember=remember,
    )
    steps = SizeSteps(bucket=bucket_step, single=size_step or math.gcd(bucket_step, 16))
    datasets, validation = plan_datasets(config, steps, policy, findings)
    plan = DataPlan(
        datasets=tuple(datasets),
        validation=tuple(validation),
        processes=processes,
        prior_loss_weight=config.dataset.prior_loss_weight,
        from_file=config.dataset.dataset_config is not None,
        notes=(),
        bad_images=findings.bad_images,
    )
    if len(problems.found) == faults_before:
        check_special_images(plan, config, findings)
    if len(problems.found) == faults_before:
        check_validation_split(plan, config, findings)
    if decoding and config.dataset.on_bad_image == "error":
        tables = [subset.items.images for dataset in datasets for subset in dataset.subsets]
        refuse_undecodable([*tables, *(each for table in tables for each in table.references)], problems)
    with problems.catch():
        check_cache_folder(config)
    check_subset_options(plan, config, findings)
    return replace(plan, notes=tuple(findings.notes))


def check_subset_options(plan: DataPlan, config: Config, findings: Findings) -> None:
    """What the subsets make of images and captions, against caches, buckets and masks."""
    check_image_options(
        plan,
        masked_loss=config.images.masked_loss,
        outside_mask=config.loss.masked_prior_preservation_weight > 0,
        control=config.run.takes_control,
        findings=findings,
    )
    if config.cache.cache_text_encoder_outputs:
        refuse_varying(plan, findings.problems, variants=config.cache.text_cache_variants)
        for line in describe_variants(plan, variants=config.cache.text_cache_variants):
            findings.note(line)


def plan_datasets(
    config: Config, steps: SizeSteps, policy: Policy, findings: Findings
) -> tuple[list[DatasetPlan], list[DatasetPlan]]:
    """The training and the validation parts of all datasets without problems."""
    seed = choose_validation_seed(config)
    datasets: list[DatasetPlan] = []
    validation: list[DatasetPlan] = []
    loaded: list[tuple[SubsetSettings, ImageTable]] = []
    with findings.problems.catch(), without_garbage_collection():
        for settings, subsets in load_dataset_settings(config, steps=steps, findings=findings):
            with findings.problems.catch():
                refuse_cache_among_images(subsets, policy.cache_dir)
                sources = [(subset, load_subset_images(subset, policy, findings)) for subset in subsets]
                loaded += sources
                sources = [
                    (subset, attach_partner_images(images, subset, policy, findings)) for subset, images in sources
                ]
                if settings is not None:
                    train_plan, validation_plans = plan_dataset(settings, sources, seed, findings)
                    datasets.append(train_plan)
                    validation.extend(validation_plans)
        refuse_overlap(datasets, validation, findings.problems)
        check_unmatched_images(loaded, findings)
    return datasets, validation


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Millions of tuples are made that all stay: collecting garbage meanwhile costs a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_special_images(plan: DataPlan, config: Config, findings: Findings) -> None:
    """Options of regularization and reference images where there are none."""
    if not plan.num_reg_images:
        if config.is_changed("prior_loss_weight"):
            findings.report_no_effect("--prior_loss_weight has no effect: there are no regularization images")
        if config.dataset.preserve_reg_images:
            findings.report_no_effect("--preserve_reg_images has no effect: there are no regularization images")
    if config.dataset.reference_dropout_rate and not plan.num_references:
        findings.report_no_effect("--reference_dropout_rate has no effect: there are no reference images")
