"""Small images, and from options to a data plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.config import load_config
from sfumato.data.find.discover import find_data
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems


def make_image(size: tuple[int, int] = (64, 64), seed: int = 0) -> Image.Image:
    """Noise over a gradient: no two pixels alike, so that a wrong orientation or crop shows."""
    width, height = size
    rng = np.random.default_rng(seed)
    gradient = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
    return Image.fromarray((gradient + rng.integers(0, 55, (height, width, 3))).astype(np.uint8))


def write_image(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(size, seed).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (64, 64), seed: int = 0) -> list[Path]:
    """img0.png ..., each with a caption of its own."""
    paths = [folder / f"img{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        write_image(path, size, seed * 1000 + i, f"tag{i}, cat, {folder.name}")
    return paths


@dataclass
class Finder:
    """From a folder and options to a plan; keeps the last call's problems."""

    root: Path
    problems: Problems
    bucket_step: int = 64

    def __call__(self, *argv: object, **options: Any) -> DataPlan:
        """The plan; raises what is wrong."""
        plan = self.attempt(*argv, **options)
        self.problems.raise_all()
        return plan

    def attempt(self, *argv: object, **options: Any) -> DataPlan:
        model = self.root / "model.safetensors"
        model.touch()
        needed = ["--pretrained_model_name_or_path", model, "--output_dir", self.root / "out"]
        if "--cache_dir" not in argv:
            needed += ["--cache_dir", self.root / "cache"]
        config = load_config([str(argument) for argument in (*argv, *needed)])
        self.problems = Problems()
        return find_data(config, problems=self.problems, **{"bucket_step": self.bucket_step, **options})

    def toml(self, text: str, *argv: object, **options: Any) -> DataPlan:
        """With a dataset file of this text; {root} stands for the test's folder."""
        path = self.root / "dataset.toml"
        path.write_text(text.replace("{root}", self.root.as_posix()), encoding="utf-8")
        return self("--dataset_config", path, *argv, **options)

    @property
    def messages(self) -> list[str]:
        return [str(error) for error in self.problems.found]

    @property
    def codes(self) -> list[str]:
        return [error.code for error in self.problems.found]


@pytest.fixture
def find(tmp_path: Path) -> Finder:
    return Finder(tmp_path, Problems())


@pytest.fixture(name="write_images")
def provide_write_images() -> Callable[..., list[Path]]:
    return write_images
