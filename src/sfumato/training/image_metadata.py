"""A picture's file: the pixels, their recipe, and the `sfumato generate` command that makes them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sfumato.common import files
from sfumato.config import Config
from sfumato.config.prompts import parse_line
from sfumato.config.schema import vocabulary
from sfumato.config.secrets import scrubbed, secrets_of
from sfumato.families.base import Sampling
from sfumato.formats.metadata import without_paths
from sfumato.sample import Picture

# What of the vocabulary a picture depends on: the base model's options but those that only training reads, and these.
OTHERS = ("base_weights", "base_weights_multiplier", "mixed_precision", "prompt_weighting", "zero_terminal_snr")
OTHERS += ("discrete_flow_shift",)  # which is that of some models' previews, too
ONLY_TRAINING = ("guidance_scale", "pos_emb_random_crop_rate", "controlnet_model_name_or_path")


def save_picture(path: Path, image: Tensor, text: Mapping[str, str]) -> None:
    """image (3, H, W) in [-1, 1] -> a PNG with `text` in it."""
    pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    with files.atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)


def recipe(picture: Picture) -> dict[str, str]:
    """All that a picture depends on besides the model."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in vars(picture).items()}


def command(config: Config, picture: Picture, usual: Sampling, more: Mapping[str, object]) -> str:
    """The line for a shell. Relative paths stay as they were given, of absolute ones only the last name is told.

    more: options beyond those of the configuration, or in their place: the adapter's file, a trained model.
    """
    options, secrets = {**model_options(config), **more, **picture_options(picture, usual)}, secrets_of(config)
    found = (word for name, value in options.items() for word in words(name, value))
    return " ".join(["sfumato generate", *(shlex.quote(scrubbed(word, secrets)) for word in found)])


def model_options(config: Config) -> dict[str, object]:
    """Every option that is not at its default and that pictures depend on."""
    known = vocabulary()
    names = [name for name, option in known.items() if option.theme == "model" and not option.facts.no_effect]
    return {
        name: config.value(name)
        for name in (*names, *OTHERS)
        if config.changed(name) and name not in ONLY_TRAINING and not known[name].secret
    }


def picture_options(picture: Picture, usual: Sampling) -> dict[str, object]:
    """The words of `sfumato generate` for a recipe; what a model has no say in is left out."""
    text = picture.prompt
    found: dict[str, object] = {"prompt": Words(text), "plain_prompt": parse_line(text, where="").prompt != text}
    found |= {"negative_prompt": Words(picture.negative_prompt)} if picture.negative_prompt else {}
    found |= {"W": picture.width, "H": picture.height, "seed": picture.seed, "steps": picture.steps}
    found |= {"scale": picture.scale, "guidance": picture.guidance}
    for name in ("cfg_trunc_ratio", "renorm_cfg"):
        found |= {name: vars(picture)[name]} if vars(picture)[name] != vars(usual)[name] else {}
    found |= {"flow_shift": picture.flow_shift}
    silent = picture.sampler == vocabulary()["sample_sampler"].default
    return found if silent else {**found, "sample_sampler": picture.sampler}


class Words(str):
    """Words of the user's that are no path, whatever they look like."""


def words(name: str, value: object) -> Iterator[str]:
    """The words of an option; none for None, nor for a switch of `sfumato generate` alone that is off."""
    if value is None or (value is False and name not in vocabulary()):
        return
    if isinstance(value, bool):
        yield f"--{name}" if value else f"--no_{name}"
        return
    texts = [shown(each) for each in (value if isinstance(value, tuple | list) else (value,))]
    if len(texts) == 1 and texts[0].startswith("-"):
        yield f"--{name}={texts[0]}"
    else:
        yield from (f"--{name}", *texts)


def shown(value: object) -> str:
    return value if isinstance(value, Words) else without_paths(str(value))
