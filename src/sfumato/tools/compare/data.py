"""What a run was trained on, for comparing: its images as the model saw them, and prompts made of its captions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from sfumato.config import Config
from sfumato.config.prompts import Prompt
from sfumato.data.cache.entries import CacheItem
from sfumato.data.find.concept_data import find_run_data
from sfumato.data.find.image_formats import IMAGE_EXTENSIONS
from sfumato.data.images import read_image
from sfumato.data.plans import DataPlan, DatasetPlan, Item, SubsetPlan
from sfumato.data.variants import make_longest_variant
from sfumato.errors import Problems, UserError
from sfumato.families.base import Family
from sfumato.track.report_samples import select_evenly

log = logging.getLogger(__name__)
MAX_REAL_IMAGES = 1000  # that images are compared with; of more, these evenly chosen
DEFAULT_PROMPTS = 4
NEUTRAL_PROMPTS = (  # where there are no regularization images
    "a photo of a dog on a beach",
    "a street in a city at night",
    "a bowl of fruit on a wooden table",
    "a portrait of a woman with red hair",
)
NO_PLAN = DataPlan(datasets=(), validation=(), processes=1, prior_loss_weight=1.0, from_file=False, notes=())


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Items with the subset that each is of; regularization images are apart."""

    plan: DataPlan
    training: Sequence[tuple[Item, SubsetPlan]] = ()
    regularization: Sequence[tuple[Item, SubsetPlan]] = ()
    held_out: Sequence[tuple[Item, SubsetPlan]] = ()


def has_data_options(config: Config) -> bool:
    return bool(config.dataset.train_data_dir or config.dataset.dataset_config or config.dataset.in_json)


def find_compared_data(config: Config, family: type[Family]) -> RunData:
    """The images of the run's options; none where these name none."""
    if config.leco.prompts_file or not has_data_options(config):
        return RunData(plan=NO_PLAN)
    problems = Problems()
    plan = find_run_data(
        config,
        bucket_step=family.bucket_step,
        size_step=family.sampling.size_multiple,
        processes=1,
        remember=True,
        problems=problems,
    )
    problems.raise_all()
    rows = list(list_items(plan.datasets))
    return RunData(
        plan=plan,
        training=[row for row in rows if not row[1].settings.is_reg],
        regularization=[row for row in rows if row[1].settings.is_reg],
        held_out=list(list_items(plan.validation)),
    )


def list_items(datasets: Iterable[DatasetPlan]) -> Iterator[tuple[Item, SubsetPlan]]:
    """Every image once, however many datasets have it."""
    seen: set[str] = set()
    for subset in (subset for dataset in datasets for subset in dataset.subsets):
        for item in subset.items:
            if item.image.path not in seen:
                seen.add(item.image.path)
                yield item, subset


def load_items(rows: Sequence[tuple[Item, SubsetPlan]]) -> tuple[list[Image.Image], list[str]]:
    """The images in their buckets, and the names of their files."""
    chosen = [rows[i] for i in select_evenly(range(len(rows)), MAX_REAL_IMAGES)]
    if len(chosen) < len(rows):
        log.info("%d images, of which %d are compared", len(rows), len(chosen))
    images: list[Image.Image] = []
    for item, subset in chosen:
        transform = item.center_transform(subset.settings.images)
        images.append(Image.fromarray(CacheItem(item.image, transform).read_pixels()))
    return images, [Path(item.image.path).name for item, _ in chosen]


def load_folder(folder: Path) -> list[Image.Image]:
    """The images of a folder; UserError where there are none."""
    paths = list_held_out(folder)
    return [read_image(paths[i]).convert("RGB") for i in select_evenly(range(len(paths)), MAX_REAL_IMAGES)]


def list_held_out(folder: Path) -> list[Path]:
    """The image files of a folder; UserError where there are none."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    paths = [path for path in paths if path.suffix.lower() in IMAGE_EXTENSIONS]
    if not paths:
        raise UserError(
            f"--held_out {folder} is no folder with images",
            code="held-out-folder-empty",
            fix="give a folder of images that were not trained on, or remove --held_out",
        )
    return paths


def make_caption_prompts(rows: Sequence[tuple[Item, SubsetPlan]], count: int) -> list[Prompt]:
    """Prompts of different captions, evenly chosen; where images have control or reference images, with these."""
    by_caption: dict[str, Prompt] = {}
    for item, subset in rows:
        caption = make_longest_variant(item.image.caption, subset.settings.rules)
        control = item.conditioning.path if item.conditioning else None
        reference = item.references[0].path if item.references else None
        if caption not in by_caption:
            by_caption[caption] = Prompt(prompt=caption, controlnet_image=control, reference_image=reference)
    captions = list(by_caption)
    return [by_caption[captions[i]] for i in select_evenly(range(len(captions)), count)]


def make_neutral_prompts(data: RunData) -> list[Prompt]:
    """Captions of regularization images, else of things that few train. UserError where the family edits images."""
    return make_caption_prompts(data.regularization, DEFAULT_PROMPTS) or [
        Prompt(prompt=text) for text in NEUTRAL_PROMPTS
    ]


def with_size(prompts: Iterable[Prompt], config: Config, data: RunData) -> list[Prompt]:
    """Prompts of the size that was trained, unless they have their own."""
    size = config.buckets.resolution
    if size is None and data.plan.datasets:
        size = data.plan.datasets[0].settings.resolution
    if size is None:
        return list(prompts)
    width, height = size
    return [replace(prompt, width=prompt.width or width, height=prompt.height or height) for prompt in prompts]
