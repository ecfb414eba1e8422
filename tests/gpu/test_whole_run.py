"""A whole run on the GPU: previews, saves and a resume; and what it saves is what the CPU saves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from families.toys import ToyShelf
from gpu.conftest import Record
from gpu.device_runs import CACHED, CPU, FAMILIES, train_on
from toy_runs import read_metrics, read_weights


def read_preview(output: Path) -> np.ndarray:
    (path,) = (output / "sample").glob("*.png")
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.int64)


@pytest.mark.parametrize("family", FAMILIES)
def test_previews_saves_and_resume(
    family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, cuda: torch.device, record: Record
) -> None:
    toy, prompts = toy_shelf.paths(family), tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1")
    options: dict[str, Any] = {**CACHED, "optimizer_type": "SGD", "sample_prompts": prompts, "sample_every_n_steps": 4}
    saves = {"save_state": True, "save_every_n_steps": 2}
    on_cpu = train_on(CPU, toy, images, tmp_path / "cpu", **options)
    start = time.perf_counter()
    straight = train_on(cuda, toy, images, tmp_path / "gpu", **options, **saves)
    seconds = time.perf_counter() - start
    state = straight / "lora-step00000002-state"
    resumed = train_on(cuda, toy, images, tmp_path / "resumed", **options, resume=state)

    expected, found, again = read_weights(on_cpu), read_weights(straight), read_weights(resumed)
    assert found.keys() == expected.keys() == again.keys()
    far = max(float((found[name] - expected[name]).abs().max()) for name in found)
    apart = max(float((found[name] - again[name]).abs().max()) for name in found)
    levels = int(np.abs(read_preview(straight) - read_preview(on_cpu)).max())
    record(seconds=seconds, weights=far, resumed=apart, preview_levels=levels)
    assert far <= 1e-4
    assert apart <= 1e-6
    assert levels <= 3
    late = [row["loss/current"] for row in read_metrics(straight) if row["step"] > 2]
    assert [row["loss/current"] for row in read_metrics(resumed)] == pytest.approx(late, rel=1e-5)
