"""What a run will train on, found before torch is imported: pictures, buckets, batches, steps."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

from sfumato.config import Config
from sfumato.data.captions import process
from sfumato.data.checks import check_pictures, masked
from sfumato.data.index import default_cache_dir
from sfumato.data.pairs import conditioning_of, refuse_unpaired
from sfumato.data.plans import DataPlan, DatasetPlan, Item, SubsetPlan
from sfumato.data.settings import DatasetSettings, Report, SubsetSettings, dataset_settings
from sfumato.data.sources import Picture, Policy, held_out, pictures_of
from sfumato.errors import Problems, UserError


def find_data(
    config: Config, *, bucket_step: int, processes: int = 1, control: bool = False, problems: Problems
) -> DataPlan:
    """Look at all folders and decide what is trained at which size and how often.

    bucket_step: bucket sides of the model must be multiples of this. processes: batches are formed over all of them.
    control: whether the method takes control images, one for each picture.
    Every fault goes to `problems`; the plan is whole only if none was added. Writes nothing but its index, in the cache
    folder.
    """
    report = Report(problems=problems, strict=config.log.strict, notes=[])
    cache_dir = config.cache.cache_dir or default_cache_dir()
    policy = Policy(
        on_missing_caption=config.dataset.on_missing_caption,
        on_bad_image=config.dataset.on_bad_image,
        cache_dir=cache_dir,
    )
    seed = config.loop.seed or 0  # a split stays the same from run to run where no seed is given
    datasets: list[DatasetPlan] = []
    validation: list[DatasetPlan] = []
    with problems.catch(), without_garbage_collection():
        for settings in dataset_settings(config, bucket_step=bucket_step, report=report):
            with problems.catch():
                refuse_cache_among_pictures(settings, cache_dir)
                for_training, for_validation = one_dataset(settings, policy, seed, report)
                datasets.append(for_training)
                validation.extend(for_validation)
    plan = DataPlan(
        datasets=tuple(datasets),
        validation=tuple(validation),
        processes=processes,
        prior_loss_weight=config.dataset.prior_loss_weight,
        from_file=config.dataset.dataset_config is not None,
        notes=tuple(report.notes),
    )
    if not problems.found and config.changed("prior_loss_weight") and plan.num_reg_images == 0:
        report.no_effect("--prior_loss_weight has no effect: there are no regularisation images")
    check_pictures(plan, masked_loss=config.images.masked_loss, control=control, report=report)
    refuse_unpaired((dataset.settings for dataset in plan.datasets), report)
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


def refuse_cache_among_pictures(settings: DatasetSettings, cache_dir: Path) -> None:
    for subset in settings.subsets:
        if cache_dir.resolve().is_relative_to(subset.image_dir.resolve()):
            raise UserError(
                f"--cache_dir {cache_dir} lies in the picture folder {subset.image_dir}, where nothing is ever written",
                fix="give another --cache_dir, or leave it out",
            )


def one_dataset(
    settings: DatasetSettings, policy: Policy, seed: int, report: Report
) -> tuple[DatasetPlan, list[DatasetPlan]]:
    """The training part, and the validation part if anything is held out."""
    training: list[SubsetPlan] = []
    validation: list[SubsetPlan] = []
    for subset in settings.subsets:
        told = len(report.problems.found)
        pictures = pictures_of(subset, policy, report)
        if not pictures and len(report.problems.found) == told:
            report.problems.add(f"{subset.where}: every image is left out, see the notes", fix="mend or remove it")
        pictures = large_enough(pictures, settings, subset, report)
        choose = settings.buckets.choose
        pairs = zip(pictures, conditioning_of(subset, pictures, policy.cache_dir, report), strict=True)
        items = tuple(Item(picture, choose((picture.width, picture.height)), other) for picture, other in pairs)
        if subset.validation_split > 0 and not subset.is_reg:
            own_seed = seed if subset.validation_seed is None else subset.validation_seed
            kept, held = held_out(len(items), subset.validation_split, own_seed)
            validation.append(
                SubsetPlan(settings=subset, items=tuple(items[i] for i in held), repeats=(1,) * len(held))
            )
            items = tuple(items[i] for i in kept)
        training.append(SubsetPlan(settings=subset, items=items, repeats=(subset.num_repeats,) * len(items)))
    plan = DatasetPlan(settings=settings, subsets=tuple(balanced(training, settings, report)))
    if not plan.num_train_images and not report.problems.found:
        what = f"{settings.where or 'the dataset'}: nothing is left to train on"
        report.problems.add(what, fix="lower skip_image_resolution or validation_split, or add images")
    return plan, [DatasetPlan(settings=settings, subsets=tuple(validation))] if validation else []


def large_enough(
    pictures: list[Picture], settings: DatasetSettings, subset: SubsetSettings, report: Report
) -> list[Picture]:
    """Without the pictures of at most `skip_image_resolution` pixels."""
    least = settings.skip_image_resolution
    if least is None:
        return pictures
    kept = [picture for picture in pictures if picture.width * picture.height > least[0] * least[1]]
    if len(kept) < len(pictures):
        report.note(f"{subset.where}: {len(pictures) - len(kept)} images of at most {least[0]}x{least[1]} are skipped")
    return kept


def balanced(subsets: Sequence[SubsetPlan], settings: DatasetSettings, report: Report) -> Iterator[SubsetPlan]:
    """As many regularisation samples as training samples: at first each with its own repeats, then once more each.

    Goes through them in order and stops as soon as the number is reached.
    """
    wanted = sum(sum(subset.repeats) for subset in subsets if not subset.settings.is_reg)
    available = sum(len(subset.items) for subset in subsets if subset.settings.is_reg)
    where = settings.where or "regularisation"
    if available and not wanted and not report.problems.found:
        report.problems.add(f"{where}: there are only regularisation images", fix="add images to train on")
    total = 0
    turns: dict[tuple[int, int], int] = {}
    places = [(s, i) for s, subset in enumerate(subsets) if subset.settings.is_reg for i in range(len(subset.items))]
    first = True
    while total < wanted and places:
        for place in places:
            more = subsets[place[0]].settings.num_repeats if first else 1
            turns[place] = turns.get(place, 0) + more
            total += more
            if total >= wanted:
                break
        first = False
    if len(turns) < len(places):
        report.note(f"{where}: {len(places) - len(turns)} of {len(places)} regularisation images are more than needed")
    for s, subset in enumerate(subsets):
        if subset.settings.is_reg:
            yield replace(subset, repeats=tuple(turns.get((s, i), 0) for i in range(len(subset.items))))
        else:
            yield subset


def captions_to_cache(plan: DataPlan, problems: Problems) -> list[str]:
    """Every caption that training will encode, so that a text encoder's output can be cached; in order, once each.

    Options that make ever new captions are a fault, each named with its subset.
    """
    found: dict[str, None] = {}
    for subset in {id(subset): subset for _, subset, _ in plan.used()}.values():
        rules = subset.settings.rules
        for name in rules.varying:
            problems.add(
                f"{subset.settings.where}: {name} makes ever new captions, but a cache of text keeps one of each",
                fix=f"leave out {name} or the cache",
            )
        if rules.varying:
            continue
        if rules.drops:
            found[""] = None
        plain = replace(rules, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
        for item in subset.items:
            found[process(item.picture.caption, plain, Random(0), epoch=1, step=0, max_train_steps=1)] = None
    return list(found)


def table(plan: DataPlan, *, accumulation: int = 1) -> list[tuple[str, str, str]]:
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
        rows.append(("validation", "images", str(plan.num_validation_images)))
    return rows


def subset_row(subset: SubsetPlan) -> tuple[str, str]:
    settings = subset.settings
    kind = "regularisation images" if settings.is_reg else "images"
    weighed = ", with masks" if masked(subset) else ""
    return str(settings.image_dir), f"{len(subset.items)} {kind}{weighed}, {subset.samples} samples per epoch"


def bucket_enlarged(dataset: DatasetPlan) -> Counter[tuple[int, int]]:
    """How many images of each bucket are made larger than they are."""
    found: Counter[tuple[int, int]] = Counter()
    for subset in dataset.subsets:
        for item in subset.items:
            (width, height), (old_width, old_height) = item.choice.resized, item.size
            found[item.choice.bucket] += width > old_width or height > old_height
    return found
