"""Training teaches: after a few steps of the demo the classifier sees the subject, and the model keeps the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sfumato.config import load_config
from sfumato.demo import demo
from sfumato.demo.base import Base, tiny_base
from sfumato.demo.classifier import load_classifier
from sfumato.demo.demo import OTHER_SUBJECTS, SEEDS, SUBJECT, SUBJECTS, DemoImages
from sfumato.demo.pipeline import load_pipeline
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.train import train

pytestmark = pytest.mark.full
KINDS = {  # options that teach as much as the demo's LoRA
    "loha": {"network_module": "loha", "network_dim": "8", "network_alpha": "8"},
    "dora": {"network_module": "lora", "network_args": "dora_wd=True"},
}


def learn(output: Path, base: Base, **options: str) -> None:
    """Training as the demo does it, but for `options`; full training has none of an adapter's options."""
    line = demo.make_command_line(base, output, {"console_log_level": "WARNING", **options})
    if options.get("method") == "full":
        line = [option for option in line if not option.startswith("--network_")]
    train(load_config(line))


def make_images(base: Base, lora: Path | None = None) -> DemoImages:
    return demo.make_images(base, lora, load_classifier())


def make_images_with(file: Path) -> DemoImages:
    """The same with an adapter of any kind."""
    pipeline = load_pipeline(tiny_base())
    pipeline.model.parts["denoiser"].unload()
    pipeline, classifier = replace(pipeline, method=InferenceAdapters(pipeline.model, [(file, 1.0)])), load_classifier()
    prompts = (*SUBJECTS, *OTHER_SUBJECTS)
    images = {prompt: [pipeline.generate(prompt, seed) for seed in SEEDS] for prompt in prompts}
    found = {prompt: [prediction.name for prediction in classifier(images[prompt])] for prompt in prompts}
    return DemoImages(images=images, predictions=found)


@pytest.fixture(scope="module")
def before() -> DemoImages:
    images = make_images(tiny_base())
    assert images.accuracy(SUBJECTS) <= 0.2
    assert images.accuracy(OTHER_SUBJECTS) >= 0.8, "else nothing could be lost"
    return images


def check(before: DemoImages, after: DemoImages) -> None:
    assert after.accuracy(SUBJECTS) >= 0.6
    assert after.accuracy(OTHER_SUBJECTS) >= 0.5 * before.accuracy(OTHER_SUBJECTS)


def test_a_lora_learns_the_subject(tmp_path: Path, before: DemoImages) -> None:
    learn(tmp_path, tiny_base(), max_train_steps="200")
    check(before, make_images(tiny_base(), tmp_path / f"{SUBJECT}.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_learn_the_subject(kind: str, tmp_path: Path, before: DemoImages) -> None:
    learn(tmp_path, tiny_base(), max_train_steps="160", **KINDS[kind])
    check(before, make_images_with(tmp_path / f"{SUBJECT}.safetensors"))


def test_full_training_learns_the_subject(tmp_path: Path, before: DemoImages) -> None:
    learn(tmp_path, tiny_base(), method="full", learning_rate="3e-4", max_train_steps="120")
    check(before, make_images(tiny_base(tmp_path / f"{SUBJECT}.safetensors")))
