"""`sfumato generate --xy`: the images of every combination of options' values, and a sheet of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sfumato.config.prompts import Prompt
from sfumato.tools.generate import ImageMaker
from sfumato.tools.generate_names import FileNames, find_free_sheet
from sfumato.tools.generate_setup import GenerateRequest
from sfumato.tools.image_sheet import draw_table, save_sheet

log = logging.getLogger(__name__)
_Place = tuple[int, int]  # on the axes: column, row


class PlotAxis(Protocol):
    """What a plot shows of an option."""

    @property
    def labels(self) -> list[str]: ...


class PlotVariant(Protocol):
    """One model, and what it makes."""

    @property
    def request(self) -> GenerateRequest: ...

    @property
    def cells(self) -> Mapping[_Place, Sequence[Prompt]]: ...


def make_cells(variant: PlotVariant, names: FileNames) -> dict[_Place, list[Path]]:
    """The images of one model, which is gone when the next one comes."""
    maker = ImageMaker(variant.request, names)
    return {place: maker.make(prompts) for place, prompts in variant.cells.items()}


def make_plot(request: GenerateRequest, axes: Sequence[PlotAxis], variants: Iterable[PlotVariant]) -> None:
    """Make all images, one model after the other, and a sheet for each prompt and seed."""
    made: dict[_Place, list[Path]] = {}
    titles: dict[int, str] = {}
    names = FileNames(request)  # numbered through all models
    for variant in variants:
        made |= make_cells(variant, names)
        for prompts in variant.cells.values():
            for number, prompt in enumerate(prompts):
                titles.setdefault(number, f"{prompt.prompt}  ·  seed {prompt.seed}")
    columns, rows = axes[0].labels, axes[1].labels if len(axes) > 1 else [""]
    for number in range(min(len(paths) for paths in made.values())):
        cells = [[made[x, y][number] for x in range(len(columns))] for y in range(len(rows))]
        path = find_free_sheet(request.outdir, "xy")
        save_sheet(draw_table(cells, columns, rows, titles[number]), path)
        log.info("%s", path)
