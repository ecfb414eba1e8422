"""Help for tests that train: a toy, a folder of pictures, and one call that does what the command line does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from sfumato.config import load_config
from sfumato.data.loader import Step
from sfumato.parallel.start import start_parallel
from sfumato.train import train, train_step
from sfumato.training.run import Run
from sfumato.training.setup_run import build_run

NEEDED = {"toy_chroma": {"apply_t5_attn_mask": True}}  # checkpoint -> options without which it is refused
# At 64 pixels the middle of the toy UNets is one token, whose attention can learn nothing.
SEVERAL_TOKENS = {"resolution": 128, "max_bucket_reso": 256}
REPORT = ("lora.report.html", "lora.report.json")


def make_images(folder: Path, count: int = 5, *, name: str = "2_cat") -> Path:
    """A training folder in the field's layout: noise pictures of two shapes, each with a caption."""
    (folder / name).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        size = (96, 64, 3) if i % 2 else (64, 64, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / name / f"{i}.png")
        (folder / name / f"{i}.txt").write_text(f"a photo of a cat, number {i}")
    return folder


def make_controlled_images(root: Path, count: int = 4) -> tuple[Path, Path]:
    """Folders of images and of control images, each of which is its image upside down."""
    images, controls = make_images(root / "images", count), make_images(root / "controls", count)
    for file in (controls / "2_cat").glob("*.png"):
        image = Image.open(file)
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(file)
    return images, controls


def make_arguments(toy: Mapping[str, Path], images: Path, output: Path, **options: Any) -> list[str]:
    """A command line; True is a flag, False and None leave an option out."""
    values: dict[str, Any] = {name: path for name, path in toy.items() if not name.startswith("tokenizer")}
    values |= NEEDED.get(Path(values["pretrained_model_name_or_path"]).stem, {})
    values |= {"train_data_dir": images, "output_dir": output, "output_name": "lora", "seed": 7, "resolution": 64}
    values |= {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128, "network_dim": 2}
    values |= {
        "learning_rate": "1e-3",
        "max_train_steps": 4,
        "caption_extension": ".txt",
        "console_log_level": "WARNING",
    }
    found: list[str] = []
    for name, value in (values | options).items():
        if value is None or value is False:
            continue
        found.append(f"--{name}")
        if value is not True:
            found += [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]
    return found


def train_toy(toy: Mapping[str, Path], images: Path, output: Path, **options: Any) -> Path:
    """Train; returns the output folder."""
    train(load_config(make_arguments(toy, images, output, **options)))
    return output


def build_toy_run(toy: Mapping[str, Path], images: Path, output: Path, **options: Any) -> Run:
    """A run before its first step."""
    found = build_run(load_config(make_arguments(toy, images, output, **options)), start_parallel())
    assert found is not None
    return found


def take_steps(run: Run, step: Step, numbers: Iterable[int]) -> list[float]:
    """As the loop does, but of one batch again and again; the losses."""
    losses: list[float] = []
    for number in numbers:
        losses.append(float(train_step(run, replace(step, index=number)).loss))
        run.method.after_step()
        run.complete_step(number + 1)
    return losses


def read_weights(output: Path, name: str = "lora") -> dict[str, torch.Tensor]:
    return load_file(output / f"{name}.safetensors")


def read_metrics(output: Path, name: str = "lora", *, keep_speed: bool = False) -> list[dict[str, float]]:
    """The rows of the metrics file without their speed, which is another each time."""
    rows = [json.loads(line) for line in (output / f"{name}.run.jsonl").read_text().splitlines()]
    if keep_speed:
        return rows
    return [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in rows]


def equal_tensors(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
