"""Training teaches: after a few steps on the demo's lesson the judge sees the subject, and the rest survives."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.config import load_config
from sfumato.demo import demo
from sfumato.demo.base import Base, tiny_base
from sfumato.demo.demo import OTHERS, PROMPTS, SUBJECT, Pictures
from sfumato.demo.judge import load_judge
from sfumato.train import train

pytestmark = pytest.mark.slow
SUBJECTS: dict[str, str] = dict.fromkeys(PROMPTS, SUBJECT)


def learn(output: Path, base: Base, **options: str) -> None:
    """Training as the demo does it, but for `options`; full training has none of an adapter's options."""
    line = demo.command_line(base, output, {"console_log_level": "WARNING", **options})
    if options.get("method") == "full":
        line = [each for each in line if not each.startswith("--network_")]
    train(load_config(line))


def drawn(base: Base, lora: Path | None = None) -> Pictures:
    return demo.pictures(base, lora, load_judge())


@pytest.fixture(scope="module")
def before() -> Pictures:
    made = drawn(tiny_base())
    assert made.share(SUBJECTS) <= 0.2
    assert made.share(OTHERS) >= 0.8, "else nothing could be lost"
    return made


def check(before: Pictures, after: Pictures) -> None:
    assert after.share(SUBJECTS) >= 0.6
    assert after.share(OTHERS) >= 0.5 * before.share(OTHERS)


def test_a_lora_learns_the_subject(tmp_path: Path, before: Pictures) -> None:
    learn(tmp_path, tiny_base(), max_train_steps="200")
    check(before, drawn(tiny_base(), tmp_path / f"{SUBJECT}.safetensors"))


def test_full_training_learns_the_subject(tmp_path: Path, before: Pictures) -> None:
    learn(tmp_path, tiny_base(), method="full", learning_rate="3e-4", max_train_steps="120")
    check(before, drawn(tiny_base(tmp_path / f"{SUBJECT}.safetensors")))
