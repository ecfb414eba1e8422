"""`sfumato dataset inspect` and --debug_dataset: what training would see of a dataset, as text and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.common import files
from sfumato.config import Config
from sfumato.data.find.discover import find_data
from sfumato.data.find.index import cache_folder
from sfumato.data.find.inspect import DatasetInspection, inspect_plan
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems
from sfumato.plan import with_seed
from sfumato.tools.bucket_step import SizeSteps, detect_size_steps
from sfumato.tools.caption_tokens import load_tokenizers
from sfumato.tools.dataset_images import load_first_samples, make_page_images
from sfumato.tools.dataset_page import PageImage, render_dataset_page
from sfumato.tools.dataset_text import list_report_lines
from sfumato.track.console import configure_logging
from sfumato.track.progress_task import ProgressTask


def inspect_dataset(
    config: Config,
    *,
    html: Path | None = None,
    images_per_subset: int = 48,
    decoding: bool = True,
    first_steps: bool = False,
) -> None:
    """Print the report, write the page if one is wanted, and raise the UserErrors that training would.

    images_per_subset: how many the page shows. decoding: read every image to its last byte, not only its header.
    first_steps: show the first samples of training, too.
    """
    config = with_seed(config)
    problems = Problems()
    steps = detect_size_steps(config, problems)
    data = find_data(
        config, bucket_step=steps.bucket, size_step=steps.single, decoding=False, problems=problems
    )  # the faults and notes of training
    notes = (*config.notes, *data.notes)
    plan = make_lenient_plan(config, steps)
    datasets = inspect_datasets(config, plan, decoding=decoding)
    add_damaged_images(datasets, problems)
    samples = load_first_samples(config, plan) if first_steps and not problems.found else []
    print("\n".join([*list_report_lines(config, plan, datasets), *(f"note: {note}" for note in notes)]))
    for sample in samples:
        print(f"{sample.title}: {sample.facts}: {sample.caption!r}")
    if html is not None:
        images = make_all_page_images(datasets, images_per_subset)
        faults = [str(error) for error in problems.found]
        files.write_text(html, render_dataset_page(plan, datasets, images, faults=faults, notes=notes, samples=samples))
        print(f"page written to {html}")
    problems.raise_all()


def show_dataset(config: Config) -> None:
    """--debug_dataset: the whole report, with the page in the output folder."""
    configure_logging(config.log)
    assert config.save.output_dir is not None
    inspect_dataset(config, html=config.save.output_dir / f"{config.save.output_name}.dataset.html", first_steps=True)


def make_lenient_plan(config: Config, steps: SizeSteps) -> DataPlan:
    """The plan that skips bad images and takes missing captions as empty, so that the rest can be inspected."""
    lenient = {"on_missing_caption": "empty", "on_bad_image": "skip"}
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update=lenient)})
    return find_data(config, bucket_step=steps.bucket, size_step=steps.single, decoding=False, problems=Problems())


def inspect_datasets(config: Config, plan: DataPlan, *, decoding: bool) -> list[DatasetInspection]:
    """Every dataset of the plan, with a progress bar."""
    with ProgressTask("decoding", "images", plain=config.log.console_log_simple) as progress:
        return inspect_plan(
            plan,
            load_tokenizers(config),
            cache_dir=cache_folder(config),
            weighted=config.captions.weighted_captions,
            decoding=decoding,
            workers=config.loader.workers,
            progress=progress,
        )


def add_damaged_images(datasets: Sequence[DatasetInspection], problems: Problems) -> None:
    """The faults that only decoding finds."""
    for dataset in datasets:
        for subset in dataset.subsets:
            for path, reason in subset.damaged.items():
                problems.add(f"{path} {reason}", code="image-not-decodable", fix="replace or remove it")


def make_all_page_images(datasets: Sequence[DatasetInspection], count: int) -> list[list[list[PageImage]]]:
    """`count` images of each subset of each dataset."""
    images = []
    for dataset in datasets:
        images.append([list(make_page_images(subset, count)) for subset in dataset.subsets])
    return images
