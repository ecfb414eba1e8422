"""The samples of a run as thumbnails for a page: rows of prompts, columns of steps."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from sfumato.common.files import open_file

MAX_SIDE = 208  # pixels of a thumbnail's longer side
QUALITY = 80
MAX_SOURCE_PIXELS = 1 << 25  # of a sample; a damaged file claims anything
MAX_GRID_STEPS, MAX_GRID_PROMPTS = 12, 12
MAX_CHARACTERS = 3_000_000  # characters of all thumbnails together


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One file in the sample folder, parsed from its name."""

    path: Path
    step: int
    number: int  # of the prompt in its file
    stamp: str  # local time, YYYYMMDDhhmmss


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small JPEG of a sample."""

    uri: str
    width: int
    height: int
    file: str  # the sample's file name in the folder sample
    settings: Mapping[str, str]  # prompt, seed, steps, ...


@dataclass(frozen=True, kw_only=True)
class PreviewGrid:
    """`cells` by (prompt, step); `omitted`: number of prompts beyond the limits."""

    steps: Sequence[int]
    prompts: Sequence[int]
    cells: Mapping[tuple[int, int], Thumbnail]
    omitted: int = 0


class Thumbnails:
    """Makes and caches thumbnails, since the page is written often."""

    def __init__(self) -> None:
        self.cache: dict[Path, Thumbnail | None] = {}

    def make_grid(self, folder: Path, name: str, *, steps_per_epoch: int, last: int, since: str) -> PreviewGrid:
        """As many samples as the limits allow, evenly over the steps, the first and the last among them.

        Skips samples after step `last`, of a run that went further before it was resumed, and those before `since`.
        """
        previews = [p for p in find_previews(folder, name, steps_per_epoch=steps_per_epoch) if p.step <= last]
        newest = select_newest([p for p in previews if p.stamp >= since])
        numbers = sorted({number for number, _ in newest})
        steps = sorted({step for _, step in newest})
        for count in range(MAX_GRID_STEPS, 0, -1):
            selected = select_evenly(steps, count)
            cells = self.make_cells(newest, numbers[:MAX_GRID_PROMPTS], selected)
            if sum(len(thumbnail.uri) for thumbnail in cells.values()) <= MAX_CHARACTERS:
                break
        else:
            return PreviewGrid(steps=(), prompts=(), cells={}, omitted=len(numbers))
        prompts = sorted({number for number, _ in cells})
        return PreviewGrid(
            steps=selected if cells else (), prompts=prompts, cells=cells, omitted=len(numbers) - len(prompts)
        )

    def make_cells(
        self, newest: Mapping[tuple[int, int], Preview], numbers: Sequence[int], steps: Sequence[int]
    ) -> dict[tuple[int, int], Thumbnail]:
        cells: dict[tuple[int, int], Thumbnail] = {}
        for cell in product(numbers, steps):
            if cell in newest and (thumbnail := self.load(newest[cell].path)):
                cells[cell] = thumbnail
        return cells

    def load(self, path: Path) -> Thumbnail | None:
        """None for a file that is no image (any more)."""
        if path not in self.cache:
            try:
                self.cache[path] = make_thumbnail(path)
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError):
                self.cache[path] = None
        return self.cache[path]


def select_newest(previews: Sequence[Preview]) -> dict[tuple[int, int], Preview]:
    """The newest of each (prompt, step)."""
    newest: dict[tuple[int, int], Preview] = {}
    for preview in previews:
        before = newest.get((preview.number, preview.step))
        if before is None or before.stamp < preview.stamp:
            newest[preview.number, preview.step] = preview
    return newest


def find_previews(folder: Path, name: str, *, steps_per_epoch: int) -> list[Preview]:
    """Every sample of this run's name: NAME_000100_00_20260101120000.png, or e000003 for an epoch."""
    pattern = re.compile(rf"{re.escape(name)}_(e?)(\d{{6,}})_(\d{{2,}})_(\d{{14}})(?:_\d+)?\.png")
    previews: list[Preview] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            step = int(match[2]) * (steps_per_epoch if match[1] else 1)
            previews.append(Preview(path=path, step=step, number=int(match[3]), stamp=match[4]))
    return previews


def select_evenly(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly spaced, the first and the last among them."""
    if len(steps) <= count:
        return list(steps)
    if count == 1:
        return [steps[-1]]
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def make_thumbnail(path: Path) -> Thumbnail:
    """Raises what Pillow raises for a file that is no PNG, and ValueError for one of more pixels than samples have."""
    with open_file(path) as file, Image.open(file, formats=("PNG",)) as image:
        if image.width * image.height > MAX_SOURCE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels")
        texts = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
        small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
    return Thumbnail(uri=uri, width=small.width, height=small.height, file=path.name, settings=texts)
