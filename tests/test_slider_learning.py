"""A slider teaches: on sfumato-tiny an attribute grows with the slider's strength, as the demo's classifier sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sfumato.config import load_config
from sfumato.demo.base import tiny_base
from sfumato.demo.classifier import load_classifier
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
SEEDS = range(5)


def learn(folder: Path, seed: int) -> Path:
    base = tiny_base()
    (folder / "slider.toml").write_text(SLIDER)
    options = {**base.model, "method": "leco", "prompts_file": str(folder / "slider.toml"), "output_dir": str(folder)}
    options |= {"output_name": "slider", "seed": str(seed), "network_dim": "8", "network_alpha": "8"}
    options |= {"learning_rate": "2e-3", "max_train_steps": "40", "max_denoising_steps": "6"}
    options |= {"leco_denoise_guidance_scale": "2", "console_log_level": "WARNING"}
    train(load_config([f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]))
    return folder / "slider.safetensors"


def measure(slider: Path, strength: float) -> float:
    """The mean probability of the attribute in images of the target prompt."""
    pipeline = load_pipeline(tiny_base())
    pipeline.model.parts["denoiser"].unload()
    adapters = InferenceAdapters(pipeline.model, [(slider, strength)])
    pipeline = replace(pipeline, method=adapters)
    predictions = load_classifier()([pipeline.generate(PROMPT, seed) for seed in SEEDS])
    return sum(prediction.probabilities[MORE] for prediction in predictions) / len(predictions)


def test_an_attribute_grows_with_the_strength(tmp_path: Path) -> None:
    slider = learn(tmp_path, 1)
    found = [measure(slider, strength) for strength in (0, 0.6, 1.2)]
    assert found == sorted(found)
    assert found[0] < 0.2
    assert found[-1] > 0.5
