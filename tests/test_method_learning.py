"""Textual inversion and LLLite teach: on sfumato-tiny a new word comes to mean a thing, a control image decides where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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
THING, INIT, WORD = "panda", "cat", "zwx"
COLORS, OTHER_COLORS = ("red", "yellow", "blue", "pink", "white", "grey"), ("green", "purple", "orange")


def learn(images: Path, output: Path, options: Mapping[str, Any]) -> Path:
    values = {**tiny_base().model, "train_data_dir": str(images), "caption_extension": ".txt", "resolution": "64"}
    values |= {"train_batch_size": "8", "lr_scheduler": "cosine", "seed": "1", "cache_latents": True}
    values |= {"output_dir": str(output), "output_name": "learned", "save_model_as": "safetensors"}
    values |= {"console_log_level": "WARNING", **options}
    train(load_config([f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]))
    return output / "learned.safetensors"


def test_a_new_word_learns_a_thing(tmp_path: Path) -> None:
    """From six images that the model made of it itself: what no vector could say, textual inversion cannot teach."""
    pipeline = load_pipeline(tiny_base())
    images = tmp_path / "images"
    images.mkdir()
    for seed, color in enumerate(COLORS):
        pipeline.generate(f"a {THING} on a {color} background", seed).save(images / f"{color}.png")
        (images / f"{color}.txt").write_text(f"a {WORD} on a {color} background")
    own = {"method": "textual_inversion", "token_string": WORD, "init_word": INIT, "learning_rate": "5e-2"}
    file = learn(images, tmp_path / "out", {**own, "max_train_steps": "50"})

    for part in pipeline.model.text_parts:  # words come with the weights
        pipeline.model.parts[part].unload()
    method = InferenceAdapters(pipeline.model, [], embeddings=[(file, WORD)])
    pipeline.model.load()
    pipeline, classifier = replace(pipeline, method=method), load_classifier()
    seen: dict[str, list[float]] = {}
    for word in (WORD, INIT):
        made = [pipeline.generate(f"a {word} on a {color} background", 1) for color in OTHER_COLORS]
        seen[word] = [prediction.probabilities[THING] for prediction in classifier(made)]
    assert max(seen[INIT]) < 0.2
    assert min(seen[WORD]) > 0.5
