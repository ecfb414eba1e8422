"""What two processes share out, and how long they wait for each other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sfumato.training.saving
from sfumato.demo.toy import write_toy
from toy_runs import make_arguments, make_images, read_metrics, train_toy
from training.stop_moments import run_pair

pytestmark = pytest.mark.full
LINE = " --w 64 --h 64 --s 2\n"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return write_toy("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def read_samples(output: Path, label: str) -> dict[str, np.ndarray]:
    """Prompt -> pixels."""
    found: dict[str, np.ndarray] = {}
    for path in sorted((output / "sample").glob(f"*_{label}_*.png")):
        with Image.open(path) as image:
            assert image.info["prompt"] not in found
            found[image.info["prompt"]] = np.asarray(image)
    return found


def test_previews_are_those_of_one_process_and_a_save_may_take_longer_than_a_sum(
    toy: Mapping[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum may wait for two seconds, and each save takes four."""
    (tmp_path / "prompts.txt").write_text("".join(f"{name}{LINE}" for name in ("a cat", "a dog", "a cup")))
    options: dict[str, Any] = {
        "sample_prompts": tmp_path / "prompts.txt", "sample_at_first": True, "sample_every_n_steps": 2,
        "max_train_steps": 2, "save_every_n_steps": 1, "network_train_unet_only": True,
    }  # fmt: skip
    alone = train_toy(toy, images, tmp_path / "alone", train_batch_size=2, **options)
    normal = sfumato.training.saving.save_output

    def save_slowly(*given: Any) -> None:
        time.sleep(4)
        normal(*given)

    monkeypatch.setattr(sfumato.training.saving, "save_output", save_slowly)
    monkeypatch.setattr("sfumato.parallel.start.timedelta", lambda minutes: timedelta(seconds=2 * minutes))
    both = tmp_path / "both"
    command = make_arguments(toy, images, both, train_batch_size=1, ddp_timeout=1, **options)
    ended = run_pair(command, tmp_path / "logs")
    assert ended.codes == [0, 0], ended.messages
    ours, theirs = read_samples(both, "000000"), read_samples(alone, "000000")
    assert list(ours) == list(theirs) == ["a cat", "a dog", "a cup"]
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert list(read_samples(both, "000002")) == ["a cat", "a dog", "a cup"]


def test_where_no_seed_is_given_one_is_drawn_for_all(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """Else each would have its own order of images, and its own weights to begin with."""
    options = {"max_train_steps": 2, "network_train_unet_only": True, "train_batch_size": 1, "seed": None}
    ended = run_pair(make_arguments(toy, images, tmp_path / "out", **options), tmp_path / "logs")
    assert ended.codes == [0, 0], ended.messages
    assert len(read_metrics(tmp_path / "out")) == 2
