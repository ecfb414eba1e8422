"""`sfumato dataset dedupe`: near-duplicates, bad images and texts that cannot be right; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sfumato.common.files import read_file
from sfumato.common.text import plural
from sfumato.data.images import decode_image
from sfumato.errors import UserError
from sfumato.tools.caption_faults import list_text_faults
from sfumato.tools.caption_output import FilesBeside
from sfumato.tools.image_batches import ImageReader
from sfumato.tools.image_hash import find_close_pairs, group_pairs, hash_image, shrink_colors
from sfumato.tools.image_page import ImageGroup, render_image_page
from sfumato.tools.image_quality import QualityLimits, QualityMeasures, measure_quality
from sfumato.track.image_cards import ImageCard, make_image_tag
from sfumato.track.progress_task import ProgressTask

BATCH_SIZE = 16
MAX_COLOR_DIFFERENCE = 24  # of 255, in the mean, of images that are one and the same
MAX_CARDS = 500  # of one group on the page
KINDS = {  # in the order of the report -> what to think of it
    "unreadable": "Training stops at these, or skips them with --on_bad_image skip.",
    "tiny": "Enlarged for training, they teach blur.",
    "blurry": "Out of focus, moved, or enlarged before.",
    "clipped": "Large parts have lost all detail to black or white.",
    "over-compressed": "What is learned are the blocks of a low JPEG quality.",
    "unreadable caption": "Training stops at these.",
    "repeated tags": "A tag counts once; one that is repeated takes room from others.",
    "caption repeats the tags": "A caption in sentences was meant, or none.",
    "contradictory tags": "One of them is wrong.",
    "caption contradicts tags": "One of both is wrong.",
}


@dataclass(frozen=True, kw_only=True)
class ReviewedImage:
    """What was measured of one image."""

    path: Path
    hashes: tuple[int, int]  # of it and of its mirror image
    colors: NDArray[np.uint8]
    quality: QualityMeasures
    byte_count: int


@dataclass(frozen=True, kw_only=True)
class DatasetReview:
    """faults: kind -> image -> what. groups: of near-duplicates, the one to keep first."""

    count: int
    groups: Sequence[Sequence[ReviewedImage]]
    faults: dict[str, dict[Path, str]] = field(default_factory=dict[str, dict[Path, str]])

    def list_lines(self) -> Iterator[str]:
        yield plural(self.count, "image")
        for group in self.groups:
            first, *others = group
            names = ", ".join(f"{image.path.name} ({describe_size(image)})" for image in others)
            yield f"near-duplicates of {first.path.name} ({describe_size(first)}): {names}"
        for kind, images in self.faults.items():
            yield f"{kind}: {len(images):,}"
            yield from (f"  {path.name}: {what}" for path, what in images.items())
        if not self.groups and not self.faults:
            yield "nothing was found"


@dataclass(frozen=True, kw_only=True)
class ReviewSettings:
    """max_distance: of 64 bits, in which hashes of near-duplicates may differ."""

    limits: QualityLimits
    caption_extension: str
    tag_extension: str
    max_distance: int
    workers: int


def review_images(images: Sequence[Path], settings: ReviewSettings) -> DatasetReview:
    faults: dict[str, dict[Path, str]] = {kind: {} for kind in KINDS}
    reader = ImageReader(prepare=measure_image, batch_size=BATCH_SIZE, workers=settings.workers, faults=[])
    found: list[ReviewedImage] = []
    with ProgressTask("reading", "images") as progress:
        done = 0
        for count, batch in reader.read_batches(images):
            found += [image.content for image in batch]
            done += count
            progress(done, len(images))
    seen = {image.path for image in found}
    for path in images:
        if path not in seen:
            reasons = [fault for fault in reader.faults if str(path) in fault]
            faults["unreadable"][path] = (
                reasons[0].partition(" — ")[0].replace(str(path), "", 1).strip() if reasons else "cannot be read"
            )
    for image in found:
        for kind, what in image.quality.list_faults(settings.limits):
            faults[kind][image.path] = what
    for path in images:
        for kind, what in find_text_faults(path, settings):
            earlier = faults[kind].get(path)
            faults[kind][path] = f"{earlier}; {what}" if earlier else what
    groups = group_duplicates(found, settings.max_distance)
    return DatasetReview(
        count=len(images), groups=groups, faults={kind: images for kind, images in faults.items() if images}
    )


def measure_image(data: bytes, path: str) -> ReviewedImage:
    image = decode_image(data, path)
    return ReviewedImage(
        path=Path(path),
        hashes=hash_image(image),
        colors=shrink_colors(image),
        quality=measure_quality(image, data),
        byte_count=len(data),
    )


def find_text_faults(path: Path, settings: ReviewSettings) -> Iterator[tuple[str, str]]:
    try:
        caption, tags = (
            FilesBeside(extension=ext).read(path) for ext in (settings.caption_extension, settings.tag_extension)
        )
    except UserError as error:
        yield "unreadable caption", error.what
        return
    yield from list_text_faults(caption, tags)


def group_duplicates(images: Sequence[ReviewedImage], distance: int) -> list[list[ReviewedImage]]:
    """Groups of images that show the same, mirrored ones among them; the largest image of each group first."""
    straight = np.array([image.hashes[0] for image in images], np.uint64)
    mirrored = np.array([image.hashes[1] for image in images], np.uint64)

    def find_pairs() -> Iterator[tuple[int, int]]:
        for others, flip in ((straight, 1), (mirrored, -1)):
            for i, j in find_close_pairs(straight, others, distance):
                first, second = (images[k].colors.astype(np.int64) for k in (i, j))
                if np.abs(first - second[:, ::flip]).mean() <= MAX_COLOR_DIFFERENCE:
                    yield i, j

    groups = []
    for rows in group_pairs(len(images), find_pairs()):
        group = [images[row] for row in rows]
        groups.append(
            sorted(group, key=lambda image: (-image.quality.size[0] * image.quality.size[1], -image.byte_count))
        )
    return groups


def describe_size(image: ReviewedImage) -> str:
    width, height = image.quality.size
    return f"{width}×{height}, {image.byte_count / 1000:,.0f} kB"


def render_review(review: DatasetReview, folder: Path, settings: ReviewSettings) -> str:
    """The page with thumbnails, which are made now: only of what is shown."""
    faulty = {path for images in review.faults.values() for path in images}
    copies = sum(len(group) - 1 for group in review.groups)
    facts = {"images": f"{review.count:,}", "near-duplicates": f"{copies:,}", "with faults": f"{len(faulty):,}"}
    groups: list[ImageGroup] = []
    if review.groups:
        rows = [make_duplicate_cards(group) for group in review.groups[:MAX_CARDS]]
        note = (
            "Each row shows one image several times; the largest is the first. Training sees it more often than others."
        )
        groups.append(ImageGroup(title=f"Near-duplicates: {len(rows):,}", note=note, rows=rows))
    for kind, images in review.faults.items():
        cards = [make_fault_card(path, what, settings) for path, what in list(images.items())[:MAX_CARDS]]
        title = f"{kind.capitalize()}: {len(images):,}"
        groups.append(ImageGroup(title=title, note=KINDS[kind], rows=[cards]))
    if not groups:
        groups.append(ImageGroup(title="Nothing was found", note="", rows=[]))
    return render_image_page(f"Review of {folder.name or folder}", "Nothing was changed.", facts, groups)


def make_duplicate_cards(group: Sequence[ReviewedImage]) -> list[ImageCard]:
    return [
        ImageCard(
            tag=load_tag(image.path), path=str(image.path), value="" if i else "largest", facts=describe_size(image)
        )
        for i, image in enumerate(group)
    ]


def make_fault_card(path: Path, what: str, settings: ReviewSettings) -> ImageCard:
    texts = [FilesBeside(extension=ext).read(path) for ext in (settings.caption_extension, settings.tag_extension)]
    caption = " | ".join(text for text in texts if text) if any(text is not None for text in texts) else None
    return ImageCard(tag=load_tag(path), path=str(path), facts=what, caption=caption)


def load_tag(path: Path) -> str:
    read: Callable[[], bytes] = partial(read_file, path)
    return make_image_tag(read, str(path))
