"""The images with the highest and the lowest losses of a run, as its report shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.common.text import plural
from sfumato.track.image_cards import ImageCard, make_image_tag, render_cards
from sfumato.track.image_list import ListedImage, find_image_list, read_image_list
from sfumato.track.loss_watch import ImageLoss, rank_images
from sfumato.track.report_curves import Curves

HIGHEST, LOWEST = 12, 6  # images on the page
RATIO_NOTE = (
    "The loss of each image over the mean of its noise levels, so that 1 is an image like all others. High values are "
    "worth a look: a wrong caption, damage, or something that no other image shows. Low ones are plain, repeated or "
    "memorized."
)


@dataclass(frozen=True, kw_only=True)
class RankedImage:
    """One image of a run, by its loss."""

    image: ListedImage
    loss: ImageLoss


def rank_run(curves: Curves, images: Sequence[ListedImage]) -> list[RankedImage]:
    """The listed images of a run, the highest loss first; empty where too few were seen often enough."""
    ranked = rank_images(curves.level_t, curves.level_losses, curves.level_images)
    return [RankedImage(image=images[loss.number], loss=loss) for loss in ranked if loss.number < len(images)]


def make_loss_card(entry: RankedImage, tag: str) -> ImageCard:
    image, loss = entry.image, entry.loss
    facts = plural(loss.samples, "sample")
    return ImageCard(tag=tag, path=image.path, value=f"{loss.ratio:.2f}", facts=facts, caption=image.caption)


class ImageWatch:
    """Keeps the list of a run's images and the thumbnails of those shown before, since the page is written often."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = find_image_list(folder, name)
        self.images: list[ListedImage] | None = None
        self.tags: dict[str, str] = {}

    def render(self, curves: Curves) -> Iterator[str]:
        """The section of the page; nothing where no image was seen often enough. UserError for a damaged list."""
        if self.images is None:
            self.images = read_image_list(self.path) if self.path.is_file() else []
        ranked = rank_run(curves, self.images)
        if not ranked:
            return
        lowest = ranked[max(HIGHEST, len(ranked) - LOWEST) :][::-1]
        parts = [f"<h3>Highest of {len(ranked):,}</h3>{self._render(ranked[:HIGHEST])}"]
        parts += [f"<h3>Lowest</h3>{self._render(lowest)}"] if lowest else []
        yield f'<section><h2>Images by their loss</h2><p class="note">{RATIO_NOTE}</p>{"".join(parts)}</section>'

    def _render(self, ranked: Sequence[RankedImage]) -> str:
        return render_cards([make_loss_card(entry, self._find_tag(entry.image)) for entry in ranked])

    def _find_tag(self, image: ListedImage) -> str:
        if image.path not in self.tags:
            self.tags[image.path] = make_image_tag(image.read, image.path)
        return self.tags[image.path]
