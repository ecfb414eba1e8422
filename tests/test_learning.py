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
    line = demo.command_line(base, output, {"console_log_level": "WARNING", **options})
    train(load_config(line))


def drawn(base: Base, lora: Path | None = None) -> Pictures:
    return demo.pictures(base, lora, load_judge())


def check(before: Pictures, after: Pictures) -> None:
    assert before.share(SUBJECTS) <= 0.2
    assert after.share(SUBJECTS) >= 0.6
    assert before.share(OTHERS) >= 0.8, "else nothing could be lost"
    assert after.share(OTHERS) >= 0.5 * before.share(OTHERS)


def test_a_lora_learns_the_subject(tmp_path: Path) -> None:
    base = tiny_base()
    learn(tmp_path, base, max_train_steps="200")
    check(drawn(base), drawn(base, tmp_path / f"{SUBJECT}.safetensors"))


def test_full_training_learns_the_subject(tmp_path: Path) -> None:
    base = tiny_base()
    line = {"method": "full", "learning_rate": "3e-4", "max_train_steps": "120"}
    learn(tmp_path, base, **line)
    check(drawn(base), drawn(tiny_base(tmp_path / f"{SUBJECT}.safetensors")))
