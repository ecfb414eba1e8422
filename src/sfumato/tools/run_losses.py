"""`sfumato dataset inspect --run`: the images of a run by their loss, as text and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.common import files
from sfumato.errors import UserError
from sfumato.tools.image_page import ImageGroup, render_image_page
from sfumato.track.image_cards import make_image_tag
from sfumato.track.image_list import find_image_list, read_image_list
from sfumato.track.image_watch import RATIO_NOTE, RankedImage, make_loss_card, rank_run
from sfumato.track.report import find_run_name
from sfumato.track.report_curves import METRICS_SUFFIX, Curves

PRINTED = 20  # images
MAX_PRINTED_CAPTION = 100  # characters


def show_run_losses(run: Path, *, html: Path | None, images_on_page: int) -> None:
    """run: the output folder of one run, or its NAME.run.jsonl. UserError where its images are not known."""
    folder, name = find_run(run)
    ranked = rank_images_of_run(folder, name)
    print(f"images of {name} by their loss over the mean of its noise level; 1 is an image like all others")
    for entry in ranked[:PRINTED]:
        caption = entry.image.caption[:MAX_PRINTED_CAPTION]
        print(f"{entry.loss.ratio:7.2f}  {entry.loss.samples:5,} samples  {Path(entry.image.path).name}: {caption!r}")
    if len(ranked) > PRINTED:
        print(f"and {len(ranked) - PRINTED:,} more")
    if html is not None:
        files.write_text(html, render_losses(name, ranked, images_on_page))
        print(f"page written to {html}")


def find_run(run: Path) -> tuple[Path, str]:
    """(folder, name)"""
    if run.is_file() and run.name.endswith(METRICS_SUFFIX):
        return run.parent, run.name.removesuffix(METRICS_SUFFIX)
    names = sorted(path.name for path in run.glob(f"*{METRICS_SUFFIX}"))
    if len(names) > 1:
        raise UserError(
            f"{run} holds several runs: {', '.join(names)}",
            code="losses-of-several-runs",
            fix=f"--run {run / names[0]}",
        )
    return run, find_run_name(run, None)


def rank_images_of_run(folder: Path, name: str) -> list[RankedImage]:
    """UserError where nothing can be ranked."""
    path = find_image_list(folder, name)
    if not path.is_file():
        raise UserError(
            f"the list of images of {name} is not in the cache folder of this user ({path.parent})",
            code="image-list-missing",
            fix="look where it was trained, before its folder was moved: every run on images writes this list",
        )
    curves = Curves(folder / f"{name}{METRICS_SUFFIX}")
    curves.read()
    ranked = rank_run(curves, read_image_list(path))
    if not ranked:
        raise UserError(
            f"{name} has seen too few images, or none of them often enough, to compare their losses",
            code="run-losses-too-few",
            fix="train longer: every image is to be seen five times, and there are to be eight of them",
        )
    return ranked


def render_losses(name: str, ranked: Sequence[RankedImage], count: int) -> str:
    cards = [make_loss_card(entry, make_image_tag(entry.image.read, entry.image.path)) for entry in ranked[:count]]
    facts = {"images": f"{len(ranked):,}", "samples": f"{sum(entry.loss.samples for entry in ranked):,}"}
    group = ImageGroup(title="Highest first", note=RATIO_NOTE, rows=[cards])
    return render_image_page(f"Images of {name} by their loss", "", facts, [group])
