"""The recipe of sfumato-tiny from drawings to a shipped file, in miniature, with drawings of its own."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image, ImageDraw

from sfumato.config import load_config
from sfumato.demo.base import tiny_base
from sfumato.demo.pipeline import load_pipeline
from sfumato.train import train

FOLDER = Path(__file__).parents[1] / "recipes" / "tiny"
MODULES = ("concepts", "drawings", "scenes", "autoencoder", "start", "finish", "lesson", "classifier", "score")


@pytest.fixture(scope="module")
def recipe() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(FOLDER))
    before = set(sys.modules)
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before & set(MODULES):
        del sys.modules[name]


@pytest.fixture
def work(tmp_path: Path, recipe: dict[str, Any]) -> Path:
    """A folder in which the packages were downloaded and drawn already: discs of different colors."""
    names = [*recipe["concepts"].CONCEPTS.values(), *recipe["concepts"].NEW_CONCEPTS.values(), "elsewhere", "more"]
    for package in recipe["drawings"].PACKAGES:
        (tmp_path / "packages" / package).mkdir(parents=True)
        (tmp_path / "sprites" / package).mkdir(parents=True)
        icons = {"icons": dict.fromkeys(names), "width": 32, "height": 32}
        (tmp_path / "packages" / package / "icons.json").write_text(json.dumps(icons))
        for i, name in enumerate(names):
            disc = Image.new("RGBA", (128, 128))
            ImageDraw.Draw(disc).ellipse((10, 10, 118, 118), fill=(37 * i % 256, 91 * i % 256, 53 * i % 256))
            disc.save(tmp_path / "sprites" / package / f"{name}.png")
    return tmp_path


def losses(work: Path, output: str, **options: str) -> list[float]:
    given = {
        "config_file": FOLDER / "train.toml",
        "pretrained_model_name_or_path": work / "start" / "start.safetensors",
        "train_data_dir": work / "scenes",
        "output_dir": work / output,
        "output_name": "tiny",
        "train_batch_size": "4",
        "max_train_steps": "6",
        "lr_warmup_steps": "2",
        "lr_decay_steps": "2",
        "console_log_level": "WARNING",
        **options,
    }
    train(load_config(["--method=full", *(f"--{name}={value}" for name, value in given.items())]))
    lines = (work / output / "tiny.run.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss/current"] for line in lines]


@pytest.mark.full
def test_the_recipe_runs_and_repeats_itself(
    work: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe["scenes"], "NUM_SCENES", 1)
    monkeypatch.setattr(recipe["autoencoder"], "BATCH", 2)
    monkeypatch.setattr(recipe["classifier"], "BATCH", 4)
    autoencoder, start = recipe["autoencoder"], recipe["start"]
    autoencoder.train(autoencoder.make_autoencoder_job(work, 4), work, 1)
    recipe["scenes"].write(work, work / "scenes" / "1_scenes")
    vae = autoencoder.load_autoencoder(work / "autoencoder-state.pt")
    start.whiten(vae, work)
    start.write(work / "start", vae)

    first = losses(work, "first")
    assert len(first) == 6
    assert losses(work, "second") == first, "the same data and seed give the same losses"
    losses(work, "parts", save_every_n_steps="3", max_train_steps="3", lr_decay_steps="0")
    assert losses(work, "parts", resume=str(work / "parts")) == first, "resumed, too"

    autoencoder.train(autoencoder.make_decoder_job(work, 2), work, 1)
    checkpoint = work / "shipped" / "sfumato-tiny.safetensors"
    checkpoint.parent.mkdir()
    recipe["finish"].write_model(work, work / "first" / "tiny.safetensors", checkpoint)
    assert load_pipeline(tiny_base(checkpoint)).generate("a cat on a blue background", 1).size == (64, 64)
    assert recipe["classifier"].train(work, 2) is not None


def test_every_word_of_every_caption_is_one_token(recipe: dict[str, Any], tmp_path: Path) -> None:
    from sfumato.families._tokenizers import load_clip_tokenizer, write_toy_clip_tokenizer

    concepts = recipe["concepts"]
    write_toy_clip_tokenizer(tmp_path, concepts.WORDS)
    tokenizer = load_clip_tokenizer(tmp_path)
    for template in concepts.TEMPLATES:
        for concept, color in zip(concepts.CONCEPTS, [*concepts.COLORS] * 2, strict=True):
            text = concepts.make_caption(template, concept, color)
            words = text.replace(",", " ,").split()
            assert len(tokenizer(text).input_ids) == len(words) + 2, text


@pytest.mark.full
def test_each_concept_has_one_unseen_background(recipe: dict[str, Any], work: Path) -> None:
    concepts, scenes = recipe["concepts"], recipe["scenes"]
    scenes.write(work, work / "scenes")
    written = {tuple(path.stem.split("-")[:2]) for path in (work / "scenes").glob("*.png")}
    pairs = set(itertools.product(concepts.CONCEPTS, concepts.COLORS))
    unseen = {concept: concepts.find_unseen_color(concept) for concept in concepts.CONCEPTS}
    assert pairs - written == set(unseen.items())
    assert set(unseen.values()) == set(concepts.COLORS)
    for path in (work / "scenes").glob("*.txt"):
        concept, color, _ = path.stem.split("-")
        assert {concept, color} <= set(path.read_text().replace(",", " ").split())


def test_the_base_knows_no_new_concept(recipe: dict[str, Any]) -> None:
    concepts = recipe["concepts"]
    assert not set(concepts.NEW_CONCEPTS) & set(concepts.CONCEPTS)
    assert not set(concepts.NEW_CONCEPTS.values()) & set(concepts.CONCEPTS.values())
