"""`sfumato dataset inspect` and --debug_dataset: what training would see of a dataset, as text and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sfumato.common import files
from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.data.cache.entries import ContentHashes, LatentNames, Place
from sfumato.data.cache.store import MemoryStore
from sfumato.data.find.discover import find_data
from sfumato.data.find.inspect import CountTokens, DatasetFindings, SubsetFindings, inspect
from sfumato.data.loader import Loader
from sfumato.data.masks import MaskNames, mask_of
from sfumato.data.order import Order
from sfumato.data.plans import DataPlan, Item, SubsetPlan
from sfumato.errors import Problems, UserError
from sfumato.families import register_all
from sfumato.families._tokenizers import clip_tokenizer, t5_tokenizer
from sfumato.families.base import find_family
from sfumato.families.source import open_source
from sfumato.plan import dataset_lines, total_steps, with_seed
from sfumato.tools.dataset_page import Shown, page, times
from sfumato.track.console import set_up
from sfumato.track.jobs import Job
from sfumato.training.caching import workers_of

CLIP_LIMIT, T5_LIMIT = 75, 512  # tokens, begin and end not counted
NAMED = 10  # files and tags that a line of text names
SAMPLES = 16  # of the first steps
LATENT_PIXEL = 8  # pixels a side, for masks


def inspect_dataset(
    config: Config, *, html: Path | None = None, pictures: int = 48, decoding: bool = True, first_steps: bool = False
) -> None:
    """Print what there is, write the page if one is wanted, and raise what training would refuse.

    pictures: how many of each subset the page shows. first_steps: show the first samples that training sees, too.
    """
    config = with_seed(config)
    problems = Problems()
    step = bucket_step(config, problems)
    notes = (
        *config.notes,
        *find_data(config, bucket_step=step, decoding=False, problems=problems).notes,
    )  # as training would
    plan = lenient_plan(config, step)
    with Job("decoding", "images", plain=config.log.console_log_simple) as progress:
        found = inspect(
            plan,
            tokenizers(config),
            weighted=config.captions.weighted_captions,
            decoding=decoding,
            workers=workers_of(config),
            progress=progress,
        )
    for subset in (subset for dataset in found for subset in dataset.subsets):
        for path, why in subset.damaged.items():
            problems.add(f"{path} {why}", fix="replace or remove it")
    samples = list(first_samples(config, plan)) if first_steps and not problems.found else []
    print("\n".join([*lines(config, plan, found), *(f"note: {note}" for note in notes)]))
    for shown in samples:
        print(f"{shown.title}: {shown.facts}: {shown.caption!r}")
    if html is not None:
        sheets = [[list(sheet(subset, pictures)) for subset in dataset.subsets] for dataset in found]
        told = [str(error) for error in problems.found]
        files.write_text(html, page(plan, found, sheets, faults=told, notes=notes, samples=samples))
        print(f"page written to {html}")
    problems.raise_all()


def show_dataset(config: Config) -> None:
    """--debug_dataset: all of it, with the page in the output folder."""
    set_up(config.log)
    assert config.save.output_dir is not None
    inspect_dataset(config, html=config.save.output_dir / f"{config.save.output_name}.dataset.html", first_steps=True)


def bucket_step(config: Config, problems: Problems) -> int:
    """What bucket sides of the model must be multiples of; 1 where no model is given."""
    if config.model.pretrained_model_name_or_path is not None:
        register_all()
        with problems.catch():
            return find_family(config.run.family, open_source(config.model)).bucket_step
    return 1


def lenient_plan(config: Config, step: int) -> DataPlan:
    """The plan with faulty pictures left out and missing captions empty, so that everything else can be looked at."""
    lenient = {"on_missing_caption": "empty", "on_bad_image": "skip"}
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update=lenient)})
    return find_data(config, bucket_step=step, decoding=False, problems=Problems())


def tokenizers(config: Config) -> dict[str, tuple[CountTokens, int]]:
    """Those of --tokenizer, or of the model's folder, or else CLIP's."""
    folders = [Path(folder) for folder in config.model.tokenizer or ()]
    model = Path(config.model.pretrained_model_name_or_path or "")
    if not folders and config.model.pretrained_model_name_or_path and model.is_dir():
        folders = sorted(path for path in model.glob("tokenizer*") if path.is_dir())
    clip_limit = config.model.max_token_length or CLIP_LIMIT
    if not folders:
        return {"CLIP": (counting(clip_tokenizer()), clip_limit)}
    found = {}
    for folder in folders:
        try:
            found[folder.name] = (counting(clip_tokenizer(folder)), clip_limit)
        except UserError:
            limit = config.model.t5xxl_max_token_length or T5_LIMIT
            found[folder.name] = (counting(t5_tokenizer(folder)), limit - 1)  # one is the end
    return found


def counting(tokenizer: Any) -> CountTokens:
    def count(captions: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids]

    return count


def lines(config: Config, plan: DataPlan, found: Sequence[DatasetFindings]) -> Iterator[str]:
    """The report as text."""
    yield from dataset_lines(config, plan)
    for dataset in found:
        for subset in dataset.subsets:
            yield subset.name
            yield from (f"  {name:<32} {value}" for name, value in facts(subset))


def facts(subset: SubsetFindings) -> Iterator[tuple[str, str]]:
    """What is worth knowing of one folder."""
    count = len(subset.plan.items)
    kind = "regularisation images" if subset.plan.settings.is_reg else "images"
    yield kind, f"{count}, each {times(subset.plan.settings.num_repeats)}, {subset.plan.samples} samples per epoch"
    damaged = [f"{Path(path).name} {why}" for path, why in subset.damaged.items()]
    for name, bad in (("not images", subset.no_images), ("damaged", damaged)):
        if bad:
            yield name, "\n".join([str(len(bad)), *(f"    {line}" for line in bad)])
    endings = ", ".join(f"{number} {ending}" for ending, number in subset.endings.items())
    yield "caption files beside them", endings or "none"
    if subset.class_tokens:
        yield "captions from class_tokens", f"{subset.class_tokens}: {subset.plan.settings.class_tokens}"
    if subset.empty:
        yield "empty captions", f"{len(subset.empty)}: {some([Path(path).name for path in subset.empty])}"
    if subset.masks:
        yield "masks", subset.masks
    for name, tokens in subset.tokens.items():
        cut = f"{tokens.over} of {count} captions are cut; " if tokens.over else ""
        yield f"tokens ({name})", f"{cut}the longest caption has {tokens.longest} of {tokens.limit}"
    if subset.distinct_tags:
        tags = some([f"{tag} {number}" for tag, number in subset.tags])
        yield "tags", f"{subset.distinct_tags} different: {tags}"


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def sheet(subset: SubsetFindings, count: int) -> Iterator[Shown]:
    """Pictures spread evenly over the subset, as they are after the crop."""
    items = [item for item in subset.plan.items if item.picture.path not in subset.damaged]
    for i in range(min(count, len(items))):
        item = items[i * len(items) // min(count, len(items))]
        yield Shown(
            picture=cropped(item, subset.plan),
            title=Path(item.picture.path).name,
            facts=f"{item.size[0]}×{item.size[1]} → {item.choice.bucket[0]}×{item.choice.bucket[1]}",
            caption=item.picture.caption,
        )


def cropped(item: Item, subset: SubsetPlan) -> Image.Image:
    """The picture in its bucket, darkened where its mask hides it from the loss."""
    rules = subset.settings.images
    transform = item.transform(rules)
    pixels = Place(item.picture, transform).pixels()
    masked = mask_of(item, rules, transform)
    return Image.fromarray(pixels) if masked is None else darkened(pixels, masked.plane() / 255)


def darkened(pixels: NDArray[Any], mask: NDArray[Any]) -> Image.Image:
    """(H, W, 3) of 0 to 255 and (H, W) in [0, 1]: a quarter of the light is left where nothing counts."""
    return Image.fromarray(np.rint(pixels * (0.25 + 0.75 * mask[..., None])).astype(np.uint8))


def first_samples(config: Config, plan: DataPlan) -> Iterator[Shown]:
    """What the first steps are trained on: the loader's own batches, with captions as they will be encoded."""
    assert config.loop.seed is not None
    cached = config.cache.cache_text_encoder_outputs
    names = LatentNames(fingerprint="none", dtype=torch.float32, hashes=ContentHashes(MemoryStore()))
    loader = Loader(
        Order(plan, seed=config.loop.seed, accumulation=config.loop.gradient_accumulation_steps),
        names=names,
        masks=MaskNames(downscale=LATENT_PIXEL, hashes=names.hashes),
        max_train_steps=max(total_steps(config, plan), 1),
        variants=config.cache.text_cache_variants if cached else 0,
        workers=0,
    )
    yield from islice(shown_batches(loader), SAMPLES)


def shown_batches(loader: Loader) -> Iterator[Shown]:
    for step, planned in zip(loader.steps(), loader.order.steps(), strict=False):
        for batch, whence in zip(step.batches, planned.batches, strict=True):
            for i, sample in enumerate(whence.samples):
                yield Shown(
                    picture=as_picture(batch, i),
                    title=f"{Path(sample.item.picture.path).name}, step {step.index + 1}",
                    facts=sizes_of(batch, i),
                    caption=batch.captions[i],
                )


def as_picture(batch: Batch, i: int) -> Image.Image:
    """The pixels of a sample, with its mask as fine as the loss has it."""
    assert batch.pixels is not None
    pixels = ((batch.pixels[i] + 1) * 127.5).permute(1, 2, 0).numpy()
    mask = np.ones(pixels.shape[:2])
    if batch.mask is not None:
        coarse = batch.mask[i, 0].numpy()
        mask = coarse.repeat(pixels.shape[0] // coarse.shape[0], 0).repeat(pixels.shape[1] // coarse.shape[1], 1)
    return darkened(pixels, mask)


def sizes_of(batch: Batch, i: int) -> str:
    """Height first, as the models are told them."""
    original, crop, target = (
        "×".join(str(int(n)) for n in each[i]) for each in (batch.sizes.original, batch.sizes.crop, batch.sizes.target)
    )
    return f"weight {float(batch.weight[i]):g}, size {original}, crop {crop}, target {target}"
