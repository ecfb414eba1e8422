"""On sfumato-tiny textual inversion has a new word mean a thing, and LLLite and ControlNet have a control image decide
where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.cli.generate import main as generate_command
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

SIDE, FREE = 40, 24  # pixels of a thing, and how far it can be moved in an image of 64
STARTS = {"left": 0, "right": FREE}
THINGS = ("heart", "cat", "apple", "pig", "fish", "sun")
PROMPTS = ("a cat on a green background", "a heart on a pink background")
EVERY_LAYER = "self_attn_q_pre,self_attn_kv_pre,cross_attn_q_pre,mlp_fc1_pre"


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


def draw_place(place: str) -> Image.Image:
    """The control image: white where the thing stands."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[FREE // 2 : FREE // 2 + SIDE, STARTS[place] : STARTS[place] + SIDE] = 255
    return Image.fromarray(pixels)


def write_moved_images(images: Path, controls: Path) -> None:
    """Each thing small, to the left and to the right on its own background."""
    for path in sorted(path for path in REG_FOLDER.rglob("*.png") if path.stem.startswith(THINGS)):
        image = Image.open(path).convert("RGB")
        for place, x in STARTS.items():
            name = f"{path.stem}-{place}"
            moved = Image.new("RGB", (64, 64), image.getpixel((0, 0)))
            moved.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, FREE // 2))
            moved.save(images / f"{name}.png")
            draw_place(place).save(controls / f"{name}.png")
            (images / f"{name}.txt").write_text(path.with_suffix(".txt").read_text())


def find_center(image: Image.Image) -> float:
    """The mean column of what differs from the background, which is the median of the image's edge."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    differs = np.abs(pixels - np.median(edge, axis=0)).sum(2) > 60
    return float(differs.nonzero()[1].mean())


LLLITE = {"method": "lllite", "network_dim": 32, "learning_rate": "1e-2", "max_train_steps": "150"}
WAYS: dict[str, tuple[dict[str, Any], str]] = {  # options of training, and the option that names the file
    "LLLite 1": ({**LLLITE, "lllite_version": 1}, "control_net_lllite_models"),
    "LLLite 2": ({**LLLITE, "lllite_version": 2, "lllite_target_layers": EVERY_LAYER}, "control_net_lllite_models"),
    "ControlNet": (
        {"method": "control_net", "learning_rate": "1e-3", "max_train_steps": "60"}, "controlnet_model_name_or_path",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_control_image_decides_where_the_thing_stands(way: str, tmp_path: Path) -> None:
    """On backgrounds on which training shows none of the things."""
    images, controls, made = (tmp_path / name for name in ("images", "controls", "made"))
    for folder in (images, controls):
        folder.mkdir()
    write_moved_images(images, controls)
    own, option = WAYS[way]
    file = learn(images, tmp_path / "out", {**own, "conditioning_data_dir": controls, "lr_warmup_steps": 10})
    lines: list[str] = []
    for place in STARTS:
        draw_place(place).save(tmp_path / f"{place}.png")
        lines += [f"{prompt} --d 1 --cn {tmp_path / place}.png --w 64 --h 64 --s 12 --l 2" for prompt in PROMPTS]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    line = [f"--{name}" if value is True else f"--{name}={value}" for name, value in tiny_base().model.items()]
    line += [f"--{option}", str(file), "--from_file", str(tmp_path / "prompts.txt")]
    assert generate_command([*line, "--outdir", str(made), "--sampler", "ddim"]) == 0
    centers = [find_center(Image.open(path)) for path in sorted(made.glob("*.png"))]
    moved = [right - left for left, right in zip(centers[:2], centers[2:], strict=True)]
    assert min(moved) > 8
    assert sum(moved) / 2 > 12
