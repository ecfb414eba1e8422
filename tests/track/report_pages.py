"""Help for tests of reports: runs and samples to report on, and a parser of the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.track.report import Report
from sfumato.track.report_facts import EMPTY_DESCRIPTION, collect_warnings
from sfumato.track.report_samples import PreviewGrid

VOID = {"meta", "link", "img", "br", "hr", "input"}
NO_SAMPLES = PreviewGrid(steps=(), prompts=(), cells={})


class PageParser(HTMLParser):
    """Checks that tags are closed in order; keeps the text and every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def write_lines(folder: Path, steps: range, *, name: str = "cat", **more: float) -> None:
    with (folder / f"{name}.run.jsonl").open("a") as file:
        for step in steps:
            row = {"step": step, "loss/current": 1 / step, "loss/average": 2 / step, "lr/unet": step * 1e-4, **more}
            row |= {"timesteps": [step % 1000 + 0.5], "loss/samples": [1 / step]}
            file.write(json.dumps(row) + "\n")


def make_description(**changes: object) -> dict[str, object]:
    return {
        **EMPTY_DESCRIPTION,
        "name": "cat",
        "model": "Toy model",
        "total": 40,
        "steps_per_epoch": 10,
        "seed": 77,
        **changes,
    }


def open_report(folder: Path, *, start: int = 0, **changes: object) -> Report:
    return Report(folder, make_description(**changes), start=start, warnings=collect_warnings())


def read_page(folder: Path, name: str = "cat") -> PageParser:
    return PageParser((folder / f"{name}.report.html").read_text(encoding="utf-8"))


def write_sample(folder: Path, file: str, prompt: str, size: tuple[int, int] = (64, 64)) -> None:
    (folder / "sample").mkdir(exist_ok=True)
    text = PngInfo()
    text.add_text("prompt", prompt)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "sample" / file, pnginfo=text)
