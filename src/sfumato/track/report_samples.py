"""The previews of a run as small pictures for a page: rows of prompts, columns of steps."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

LONGEST = 208  # pixels of a thumbnail's longer side
QUALITY = 80
MOST_STEPS, MOST_PROMPTS = 12, 12
BUDGET = 3_000_000  # characters of all thumbnails together


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One file in the sample folder, by what its name says."""

    path: Path
    step: int
    number: int  # of the prompt in its file
    stamp: str  # local time, as the name has it


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    uri: str
    width: int
    height: int
    file: str  # the name of the whole picture, in the sample folder
    recipe: Mapping[str, str]  # prompt, seed, steps, ...


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`cells` by (prompt, step); `left_out` prompts for which there is no room."""

    steps: Sequence[int]
    numbers: Sequence[int]
    cells: Mapping[tuple[int, int], Thumbnail]
    left_out: int = 0


class Thumbnails:
    """Each picture is made small once, however often the page is written."""

    def __init__(self) -> None:
        self.made: dict[Path, Thumbnail | None] = {}

    def grid(self, folder: Path, name: str, *, steps_per_epoch: int, last: int, since: str) -> Grid:
        """What fits the budget, thinned out evenly over the steps, the first and the last kept."""
        newest: dict[tuple[int, int], Preview] = {}
        for preview in previews(folder, name, steps_per_epoch=steps_per_epoch):
            before = newest.get((preview.number, preview.step))
            late = preview.step > last  # of a run that went further, before this one was resumed
            if not late and preview.stamp >= since and (before is None or before.stamp < preview.stamp):
                newest[preview.number, preview.step] = preview
        numbers = sorted({number for number, _ in newest})
        steps = sorted({step for _, step in newest})
        for most in range(MOST_STEPS, 0, -1):
            kept = evenly(steps, most)
            cells = {
                (number, step): thumbnail
                for number in numbers[:MOST_PROMPTS]
                for step in kept
                if (number, step) in newest and (thumbnail := self.thumbnail(newest[number, step].path))
            }
            if sum(len(each.uri) for each in cells.values()) <= BUDGET:
                break
        else:
            return Grid(steps=(), numbers=(), cells={}, left_out=len(numbers))
        there = [number for number in numbers if any(cell[0] == number for cell in cells)]
        return Grid(steps=kept if cells else (), numbers=there, cells=cells, left_out=len(numbers) - len(there))

    def thumbnail(self, path: Path) -> Thumbnail | None:
        """None for a file that is no picture (any more)."""
        if path not in self.made:
            try:
                self.made[path] = thumbnail(path)
            except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
                self.made[path] = None
        return self.made[path]


def previews(folder: Path, name: str, *, steps_per_epoch: int) -> list[Preview]:
    """Every picture of this run's name: NAME_000100_00_20260101120000.png, or e000003 for an epoch."""
    pattern = re.compile(rf"{re.escape(name)}_(e?)(\d{{6,}})_(\d{{2,}})_(\d{{14}})(?:_\d+)?\.png")
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            step = int(match[2]) * (steps_per_epoch if match[1] else 1)
            found.append(Preview(path=path, step=step, number=int(match[3]), stamp=match[4]))
    return found


def evenly(steps: Sequence[int], most: int) -> list[int]:
    if len(steps) <= most:
        return list(steps)
    if most == 1:
        return [steps[-1]]
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def thumbnail(path: Path) -> Thumbnail:
    with Image.open(path) as picture:
        recipe = {key: value for key, value in picture.info.items() if isinstance(key, str) and isinstance(value, str)}
        small = picture.convert("RGB")
    small.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
    return Thumbnail(uri=uri, width=small.width, height=small.height, file=path.name, recipe=recipe)
