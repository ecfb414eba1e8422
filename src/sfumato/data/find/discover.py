"""What a run will train on, found before torch is imported: pictures, buckets, batches, steps."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from sfumato.config import Config
from sfumato.config.validation import LEVELS
from sfumato.data.find.checks import check_pictures, masked
from sfumato.data.find.conditioning_images import refuse_spare, with_conditioning
from sfumato.data.find.image_table import Column, Pictures
from sfumato.data.find.index import default_cache_dir
from sfumato.data.find.policy import Policy
from sfumato.data.find.report import Report
from sfumato.data.find.settings import DatasetSettings, SubsetSettings, dataset_settings
from sfumato.data.find.sources import pictures_of
from sfumato.data.find.tar_source import are_shards
from sfumato.data.find.verify_images import undamaged
from sfumato.data.order import HeldOut
from sfumato.data.plans import DataPlan, DatasetPlan, Items, SubsetPlan
from sfumato.data.split import check_held_out, halves, refuse_overlap, still, validation_seed
from sfumato.data.variants import refuse_varying, told
from sfumato.errors import Problems, UserError


def find_data(
    config: Config,
    *,
    bucket_step: int,
    processes: int = 1,
    control: bool = False,
    decoding: bool = True,
    problems: Problems,
) -> DataPlan:
    """Look at all folders and decide what is trained at which size and how often.

    bucket_step: bucket sides of the model must be multiples of this. processes: batches are formed over all of them.
    control: whether the method takes control images, one for each picture. decoding: whether pictures may be decoded,
    once each, where --on_bad_image skip asks to leave out the bad ones.
    Every fault goes to `problems`; the plan is whole only if none was added. Writes nothing but its index, in the cache
    folder.
    """
    report = Report(problems=problems, strict=config.log.strict, notes=[])
    cache_dir = config.cache.cache_dir or default_cache_dir()
    policy = Policy(
        on_missing_caption=config.dataset.on_missing_caption,
        on_bad_image=config.dataset.on_bad_image,
        cache_dir=cache_dir,
        decoding=decoding and config.dataset.on_bad_image == "skip",
    )
    seed = validation_seed(config)
    datasets: list[DatasetPlan] = []
    validation: list[DatasetPlan] = []
    every: list[tuple[SubsetSettings, Pictures]] = []
    with problems.catch(), without_garbage_collection():
        for settings, subsets in dataset_settings(config, bucket_step=bucket_step, report=report):
            with problems.catch():
                refuse_cache_among_pictures(subsets, cache_dir)
                whole = [(subset, some_pictures(subset, policy, report)) for subset in subsets]
                every += whole
                found = [(subset, with_conditioning(each, subset, policy, report)) for subset, each in whole]
                if settings is not None:
                    for_training, for_validation = one_dataset(settings, found, seed, report)
                    datasets.append(for_training)
                    validation.extend(for_validation)
        refuse_overlap(datasets, validation, problems)
        refuse_spare(every, report)
    plan = DataPlan(
        datasets=tuple(datasets),
        validation=tuple(validation),
        processes=processes,
        prior_loss_weight=config.dataset.prior_loss_weight,
        from_file=config.dataset.dataset_config is not None,
        notes=tuple(report.notes),
        bad_images=report.bad_images,
    )
    if not problems.found and config.changed("prior_loss_weight") and plan.num_reg_images == 0:
        report.no_effect("--prior_loss_weight has no effect: there are no regularisation images")
    if not problems.found and config.dataset.preserve_reg_images and plan.num_reg_images == 0:
        report.no_effect("--preserve_reg_images has no effect: there are no regularisation images")
    if not problems.found:
        check_held_out(plan, config, report)
    check_pictures(
        plan,
        masked_loss=config.images.masked_loss,
        outside_mask=config.loss.masked_prior_preservation_weight > 0,
        control=control,
        report=report,
    )
    if config.cache.cache_text_encoder_outputs:
        refuse_varying(plan, problems, variants=config.cache.text_cache_variants)
        for line in told(plan, variants=config.cache.text_cache_variants):
            report.note(line)
    return replace(plan, notes=tuple(report.notes))


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Millions of tuples are made that all stay: looking through them again and again for garbage costs a tenth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def refuse_cache_among_pictures(subsets: Sequence[SubsetSettings], cache_dir: Path) -> None:
    place = cache_dir.resolve()
    for subset in subsets:
        for folder in (subset.image_dir, subset.conditioning_data_dir):
            if folder is None:
                continue
            inside = place == folder.parent.resolve() if are_shards(folder) else place.is_relative_to(folder.resolve())
            if inside:
                raise UserError(
                    f"--cache_dir {cache_dir} lies in the picture folder {folder}, where nothing is ever written",
                    fix="give another --cache_dir, or leave it out",
                )


def some_pictures(subset: SubsetSettings, policy: Policy, report: Report) -> Pictures:
    """The subset's pictures; that there are none is a fault."""
    told = len(report.problems.found)
    pictures = pictures_of(subset, policy, report)
    good = undamaged(pictures, subset.where, policy, report)
    pictures = pictures if len(good) == len(pictures) else pictures.take(good)
    if not len(pictures) and len(report.problems.found) == told:
        report.problems.add(f"{subset.where}: every image is left out, see the notes", fix="mend or remove it")
    return pictures


def one_dataset(
    settings: DatasetSettings, found: Sequence[tuple[SubsetSettings, Pictures]], seed: int, report: Report
) -> tuple[DatasetPlan, list[DatasetPlan]]:
    """The training part, and the validation part if anything is held out."""
    training: list[SubsetPlan] = []
    validation: list[SubsetPlan] = []
    for subset, pictures in found:
        items = Items.chosen(pictures, settings.buckets.choose)
        kept, held = halves(len(items), subset, seed)
        kept, held = (large_enough(places, pictures, settings) for places in (kept, held))
        if len(kept) + len(held) < len(items):
            report.note(skipped(len(items) - len(kept) - len(held), settings, subset))
        if len(held):
            validation.append(SubsetPlan(settings=still(subset), items=items.take(held), repeats=(1,) * len(held)))
        if len(kept) < len(items):
            items = items.take(kept)
        training.append(SubsetPlan(settings=subset, items=items, repeats=(subset.num_repeats,) * len(items)))
    plan = DatasetPlan(settings=settings, subsets=tuple(balanced(training, settings, report)))
    if not plan.num_train_images and not report.problems.found:
        what = f"{settings.where or 'the dataset'}: nothing is left to train on"
        report.problems.add(what, fix="lower skip_image_resolution or validation_split, or add images")
    return plan, [DatasetPlan(settings=settings, subsets=tuple(validation))] if validation else []


def large_enough(places: Column, pictures: Pictures, settings: DatasetSettings) -> Column:
    """Without the pictures of at most `skip_image_resolution` pixels."""
    least = settings.skip_image_resolution
    if least is None:
        return places
    return places[pictures.widths[places] * pictures.heights[places] > least[0] * least[1]]


def skipped(count: int, settings: DatasetSettings, subset: SubsetSettings) -> str:
    assert settings.skip_image_resolution is not None
    width, height = settings.skip_image_resolution
    return f"{subset.where}: {count} images of at most {width}x{height} are skipped"


def balanced(subsets: Sequence[SubsetPlan], settings: DatasetSettings, report: Report) -> Iterator[SubsetPlan]:
    """As many regularisation samples as training samples: at first each with its own repeats, then once more each.

    Goes through them in order and stops as soon as the number is reached.
    """
    wanted = sum(sum(subset.repeats) for subset in subsets if not subset.settings.is_reg)
    available = sum(len(subset.items) for subset in subsets if subset.settings.is_reg)
    where = settings.where or "regularisation"
    if available and not wanted and not report.problems.found:
        report.problems.add(f"{where}: there are only regularisation images", fix="add images to train on")
    repeats = shares(
        [(subset.settings.num_repeats, len(subset.items)) for subset in subsets if subset.settings.is_reg], wanted
    )
    surplus = sum(each.count(0) for each in repeats)
    if surplus:
        report.note(f"{where}: {surplus} of {available} regularisation images are more than needed")
    waiting = iter(repeats)
    for subset in subsets:
        yield replace(subset, repeats=next(waiting)) if subset.settings.is_reg else subset


def shares(groups: Sequence[tuple[int, int]], wanted: int) -> list[tuple[int, ...]]:
    """How often each regularisation image appears, by group of (own repeats, images)."""
    own = np.repeat([repeats for repeats, _ in groups], [images for _, images in groups]).astype(np.int64)
    before = np.cumsum(own) - own
    found = np.where(before < wanted, own, 0)  # the first pass, up to the image that reaches the number
    more = wanted - int(found.sum())
    if more > 0 and len(own):
        found += more // len(own)
        found[: more % len(own)] += 1
    parts = np.split(found, np.cumsum([images for _, images in groups])[:-1]) if groups else []
    return [tuple(part.tolist()) for part in parts]


def table(plan: DataPlan, *, accumulation: int = 1, held_out: HeldOut | None = None) -> list[tuple[str, str, str]]:
    """(group, name, value) for the report before the first step: subsets, buckets, batches and steps."""
    rows: list[tuple[str, str, str]] = []
    for i, dataset in enumerate(plan.datasets, 1):
        group = f"dataset {i}" if len(plan.datasets) > 1 else "dataset"
        width, height = dataset.settings.resolution
        rows.append((group, "resolution", f"{width}x{height}, batch size {dataset.settings.batch_size}"))
        rows += [(group, *subset_row(subset)) for subset in dataset.subsets]
        enlarged = bucket_enlarged(dataset)
        for size, count in dataset.buckets.items():
            more = f", {enlarged[size]} images enlarged" if enlarged[size] else ""
            rows.append((group, f"bucket {size[0]}x{size[1]}", f"{count} samples{more}"))
    rows.append(("epoch", "samples", str(plan.samples_per_epoch)))
    over = f" over {plan.processes} processes" if plan.processes > 1 else ""
    rows.append(("epoch", "batches", f"{plan.batches_per_epoch}{over}"))
    rows.append(("epoch", "steps", str(plan.steps_per_epoch(accumulation))))
    if plan.validation:
        seen = plan.num_validation_images if held_out is None else held_out.samples
        less = f", {seen} of them are looked at" if seen < plan.num_validation_images else ""
        rows.append(("validation", "images", f"{plan.num_validation_images}{less}"))
    if held_out is not None and plan.validation:
        rows.append(("validation", "batches", f"{len(held_out.batches)}, each at {LEVELS} noise levels"))
    return rows


def subset_row(subset: SubsetPlan) -> tuple[str, str]:
    settings = subset.settings
    kind = "regularisation images" if settings.is_reg else "images"
    weighed = ", with masks" if masked(subset) else ""
    preserved = ", held to the untrained model" if settings.preserved else ""
    return str(settings.place), f"{len(subset.items)} {kind}{weighed}{preserved}, {subset.samples} samples per epoch"


def bucket_enlarged(dataset: DatasetPlan) -> Counter[tuple[int, int]]:
    """How many images of each bucket are made larger than they are."""
    found: Counter[tuple[int, int]] = Counter()
    for subset in dataset.subsets:
        items, pictures = subset.items, subset.items.pictures
        resized = np.array([choice.resized for choice in items.choices], np.int64).reshape(-1, 2)[items.which]
        enlarged = (resized[:, 0] > pictures.widths) | (resized[:, 1] > pictures.heights)
        for size, places in items.buckets().items():
            found[size] += int(enlarged[places].sum())
    return found
