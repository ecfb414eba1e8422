"""Training teaches: after a few steps of the demo the classifier sees the subject, and the model keeps the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sfumato.config import load_config
from sfumato.demo import demo
from sfumato.demo.base import Base, tiny_base
from sfumato.demo.classifier import load_classifier
from sfumato.demo.demo import OTHER_SUBJECTS, SUBJECT, SUBJECTS, DemoImages
from sfumato.demo.pipeline import load_pipeline
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.train import train

pytestmark = pytest.mark.full
KINDS: dict[str, dict[str, str | bool]] = {  # options that teach as much as the demo's LoRA
    "lora": {"network_module": "lora"},
    "loha": {"network_module": "loha", "network_dim": "8", "network_alpha": "8"},
    "dora": {"network_module": "lora", "network_args": "dora_wd=True"},
    "lokr": {"network_module": "lokr", "learning_rate": "1e-2", "train_batch_size": "8", "max_train_steps": "100"},
    "boft": {  # whose steps are slow
        "network_module": "boft", "learning_rate": "8e-4", "max_train_steps": "60", "network_train_unet_only": True,
    },
}  # fmt: skip
QUICK = {"train_batch_size": "4", "max_train_steps": "160"}  # half the demo's batch, and of its steps
JUDGED = (1, 2)  # seeds


def learn(output: Path, base: Base, **options: str | bool) -> None:
    """Training as the demo does it, but for `options`; full training has none of an adapter's options."""
    line = demo.make_command_line(base, output, {"console_log_level": "WARNING", **options})
    if options.get("method") == "full":
        line = [option for option in line if not option.startswith("--network_")]
    train(load_config(line))


def make_images(base: Base, adapter: Path | None = None) -> DemoImages:
    """The demo's images in half of its steps, with an adapter of any kind."""
    pipeline, classifier = load_pipeline(replace(base, steps=10)), load_classifier()
    if adapter is not None:
        pipeline.model.parts["denoiser"].unload()
        pipeline = replace(pipeline, method=InferenceAdapters(pipeline.model, [(adapter, 1.0)], calculated=True))
    images = {prompt: [pipeline.generate(prompt, seed) for seed in JUDGED] for prompt in (*SUBJECTS, *OTHER_SUBJECTS)}
    found = {prompt: [prediction.name for prediction in classifier(images[prompt])] for prompt in images}
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


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_the_subject(kind: str, tmp_path: Path, before: DemoImages) -> None:
    learn(tmp_path, tiny_base(), **QUICK | KINDS[kind])
    check(before, make_images(tiny_base(), tmp_path / f"{SUBJECT}.safetensors"))


def test_full_training_learns_the_subject(tmp_path: Path, before: DemoImages) -> None:
    learn(tmp_path, tiny_base(), **QUICK | {"method": "full", "learning_rate": "3e-4", "max_train_steps": "120"})
    check(before, make_images(tiny_base(tmp_path / f"{SUBJECT}.safetensors")))
