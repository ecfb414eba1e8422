"""The loss watch finds wrong captions: on sfumato-tiny, three of thirty images have the caption of another."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from sfumato.config import load_config
from sfumato.demo.base import tiny_base
from sfumato.demo.demo import REG_FOLDER
from sfumato.demo.pipeline import load_pipeline
from sfumato.tools.run_losses import rank_images_of_run
from sfumato.train import train

pytestmark = pytest.mark.full
COLORS = ("green", "blue", "red", "yellow", "white")
STEPS, WRONG, AMONG = 100, 3, 5


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twenty things that the model knows, and ten of them as it draws them itself on other backgrounds."""
    folder = tmp_path_factory.mktemp("images")
    known = sorted(REG_FOLDER.rglob("*.png"))
    for path in known:
        shutil.copy(path, folder)
        shutil.copy(path.with_suffix(".txt"), folder)
    pipeline = load_pipeline(tiny_base())
    for i, path in enumerate(known[::2]):
        subject, _, color = path.stem.split("-")
        other = next(name for name in COLORS[i % 3 :] if name != color)
        pipeline.generate(f"a {subject} on a {other} background", i).save(folder / f"{subject}-made-{other}.png")
        (folder / f"{subject}-made-{other}.txt").write_text(f"a {subject} on a {other} background")
    return folder


def confuse(images: Path, folder: Path, seed: int) -> set[str]:
    """Copy the images, three of them with the caption of another subject on another color; gives their names."""
    shutil.copytree(images, folder)
    rng = random.Random(seed)
    paths = sorted(folder.glob("*.png"))
    captions = {path: path.with_suffix(".txt").read_text() for path in paths}
    chosen = rng.sample(paths, WRONG)
    for path in chosen:
        subject, _, color = path.stem.split("-")
        others = [p for p in paths if p.stem.split("-")[0] != subject and p.stem.split("-")[2] != color]
        path.with_suffix(".txt").write_text(captions[rng.choice(others)])
    return {path.name for path in chosen}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_wrong_captions_are_among_the_first(images: Path, tmp_path: Path, seed: int) -> None:
    wrong = confuse(images, tmp_path / "images", seed)
    base = tiny_base()
    options = {**base.model, **base.training, "train_data_dir": str(tmp_path / "images"), "caption_extension": ".txt"}
    options |= {"output_dir": str(tmp_path / "out"), "output_name": "watch", "network_module": "networks.lora"}
    options |= {"learning_rate": "1e-4", "max_train_steps": str(STEPS), "seed": str(seed), "cache_latents": True}
    options |= {"resolution": str(base.size), "console_log_level": "WARNING"}
    train(load_config([f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]))
    ranked = rank_images_of_run(tmp_path / "out", "watch")
    assert len(ranked) == 30
    assert wrong <= {Path(entry.image.path).name for entry in ranked[:AMONG]}
