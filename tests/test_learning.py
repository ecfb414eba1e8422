"""Training teaches: after a few steps of the demo the classifier sees the subject, and the model keeps the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.config import load_config
from sfumato.demo import demo
from sfumato.demo.base import Base, tiny_base
from sfumato.demo.classifier import load_classifier
from sfumato.demo.demo import OTHER_SUBJECTS, SUBJECT, SUBJECTS, DemoImages
from sfumato.train import train

pytestmark = pytest.mark.full


def learn(output: Path, base: Base, **options: str) -> None:
    """Training as the demo does it, but for `options`; full training has none of an adapter's options."""
    line = demo.make_command_line(base, output, {"console_log_level": "WARNING", **options})
    if options.get("method") == "full":
        line = [option for option in line if not option.startswith("--network_")]
    train(load_config(line))


def make_images(base: Base, lora: Path | None = None) -> DemoImages:
    return demo.make_images(base, lora, load_classifier())


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


def test_full_training_learns_the_subject(tmp_path: Path, before: DemoImages) -> None:
    learn(tmp_path, tiny_base(), method="full", learning_rate="3e-4", max_train_steps="120")
    check(before, make_images(tiny_base(tmp_path / f"{SUBJECT}.safetensors")))
