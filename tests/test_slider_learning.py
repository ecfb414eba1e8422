"""Sliders teach: on sfumato-tiny an attribute grows with the strength, as the demo's classifier and the pixels show."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.config import load_config
from sfumato.demo.base import tiny_base
from sfumato.demo.classifier import load_classifier
from sfumato.demo.demo import REG_FOLDER
from sfumato.demo.pipeline import load_pipeline
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.train import train

pytestmark = pytest.mark.full
PROMPT, MORE = "a cat on a blue background", "panda"
SLIDER = f"""
resolution = 64
batch_size = 2
neutral = "{PROMPT}"
[[targets]]
target_class = "{PROMPT}"
positive = "a {MORE} on a blue background"
negative = "{PROMPT}"
"""
SEEDS = range(4)
QUICK = {"network_dim": "8", "network_alpha": "8", "network_train_unet_only": True, "console_log_level": "WARNING"}


def learn(folder: Path, **options: str | bool) -> Path:
    base = tiny_base()
    given = {**base.model, **QUICK, "output_dir": str(folder), "output_name": "slider", **options}
    train(load_config([f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]))
    return folder / "slider.safetensors"


def generate(slider: Path, strength: float) -> list[Image.Image]:
    """Images of the target prompt, in half as many steps as the demo's."""
    pipeline = load_pipeline(replace(tiny_base(), steps=10))
    pipeline.model.parts["denoiser"].unload()
    pipeline = replace(pipeline, method=InferenceAdapters(pipeline.model, [(slider, strength)]))
    return [pipeline.generate(PROMPT, seed) for seed in SEEDS]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_attribute_grows_with_the_strength(tmp_path: Path, seed: int) -> None:
    """Its mean probability."""
    (tmp_path / "slider.toml").write_text(SLIDER)
    slider = learn(
        tmp_path,
        method="leco",
        prompts_file=str(tmp_path / "slider.toml"),
        seed=str(seed),
        learning_rate="2e-3",
        max_train_steps="40",
        max_denoising_steps="6",
        leco_denoise_guidance_scale="2",
    )
    classify = load_classifier()
    found = [
        statistics.fmean(each.probabilities[MORE] for each in classify(generate(slider, strength)))
        for strength in (0, 0.6, 1.2)
    ]
    assert found == sorted(found)
    assert found[0] < 0.2
    assert found[-1] > 0.5


def test_brightness_grows_with_the_strength_of_a_slider_of_pairs(tmp_path: Path) -> None:
    """Of the mean of all pixels, 0 to 255; the subject stays what it was."""
    for name, change in (("more", lambda x: 127 + x // 2), ("less", lambda x: x // 2)):
        (tmp_path / name).mkdir()
        for path in sorted(REG_FOLDER.rglob("*.png"))[:8]:
            Image.open(path).convert("RGB").point(change).save(tmp_path / name / path.name)
            (tmp_path / name / path.name).with_suffix(".txt").write_text(path.with_suffix(".txt").read_text())
    slider = learn(
        tmp_path,
        method="image_slider",
        train_data_dir=str(tmp_path / "more"),
        reference_data_dirs=str(tmp_path / "less"),
        caption_extension=".txt",
        resolution="64",
        train_batch_size="4",
        seed="1",
        learning_rate="2e-3",
        max_train_steps="30",
        cache_latents=True,
    )
    images = {strength: generate(slider, strength) for strength in (-1, 0, 1)}
    found = [statistics.fmean(float(np.asarray(image).mean()) for image in images[each]) for each in (-1, 0, 1)]
    assert found[1] - found[0] > 15
    assert found[2] - found[1] > 15
