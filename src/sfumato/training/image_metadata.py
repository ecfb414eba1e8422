"""A generated image's file: its pixels, its request, and the `sfumato generate` command that makes it again."""

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
from sfumato.common.text import strip_paths
from sfumato.config import Config
from sfumato.config.prompts import parse_line
from sfumato.config.schema import vocabulary
from sfumato.config.secrets import collect_secrets, redact
from sfumato.families.blueprint import Sampling
from sfumato.sampling.request import ImageRequest

# Options that an image depends on: the base model's but those that only training reads, and these.
OTHER_OPTIONS = ("base_weights", "base_weights_multiplier", "mixed_precision", "prompt_weighting", "zero_terminal_snr")
OTHER_OPTIONS += ("discrete_flow_shift",)  # some models' previews use it, too
TRAINING_OPTIONS = ("guidance_scale", "pos_emb_random_crop_rate")


def save_image(path: Path, image: Tensor, text: Mapping[str, str]) -> None:
    """image (3, H, W) in [-1, 1] -> a PNG with `text` in it."""
    pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    with files.write_atomically(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)


def image_metadata(request: ImageRequest) -> dict[str, str]:
    """All that an image depends on besides the model, as text; of an absolute path only the last name."""
    values = vars(request) | {"reference_image": strip_paths(request.reference_image)}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def generate_command(config: Config, request: ImageRequest, defaults: Sampling, more: Mapping[str, object]) -> str:
    """The line for a shell. Relative paths stay as they were given, of absolute ones only the last name is kept.

    more: options beyond those of the configuration, or in their place: the adapter's file, a trained model.
    """
    options, secrets = {**model_options(config), **more, **request_options(request, defaults)}, collect_secrets(config)
    words = ["sfumato generate"]
    for name, value in options.items():
        words += [shlex.quote(redact(word, secrets)) for word in make_arguments(name, value)]
    return " ".join(words)


def model_options(config: Config) -> dict[str, object]:
    """Every option that is not at its default and that images depend on."""
    known = vocabulary()
    names = [name for name, option in known.items() if option.theme == "model" and not option.facts.no_effect]
    return {
        name: config.value(name)
        for name in (*names, *OTHER_OPTIONS)
        if config.is_changed(name) and name not in TRAINING_OPTIONS and not known[name].secret
    }


def request_options(request: ImageRequest, defaults: Sampling) -> dict[str, object]:
    """The options of `sfumato generate` for a request; None where the request has no value."""
    text = request.prompt
    options: dict[str, object] = {"prompt": UserText(text), "plain_prompt": parse_line(text, where="").prompt != text}
    options |= {"negative_prompt": UserText(request.negative_prompt)} if request.negative_prompt else {}
    options |= {"W": request.width, "H": request.height, "seed": request.seed, "steps": request.steps}
    options |= {"scale": request.scale, "guidance": request.guidance}
    for name in ("cfg_trunc_ratio", "renorm_cfg"):
        options |= {name: vars(request)[name]} if vars(request)[name] != vars(defaults)[name] else {}
    options |= {"flow_shift": request.flow_shift, "reference_image": request.reference_image or None}
    if request.sampler != vocabulary()["sample_sampler"].default:
        options["sample_sampler"] = request.sampler
    return options


class UserText(str):
    """Text of the user's that is no path, whatever it looks like."""


def make_arguments(name: str, value: object) -> Iterator[str]:
    """An option as it is typed; nothing for None, nor for a switch of `sfumato generate` alone that is off."""
    if value is None or (value is False and name not in vocabulary()):
        return
    if isinstance(value, bool):
        yield f"--{name}" if value else f"--no_{name}"
        return
    texts = [strip_path(item) for item in (value if isinstance(value, tuple | list) else (value,))]
    if len(texts) == 1 and texts[0].startswith("-"):
        yield f"--{name}={texts[0]}"
    else:
        yield from (f"--{name}", *texts)


def strip_path(value: object) -> str:
    """A value as text; of an absolute path only the last name."""
    return value if isinstance(value, UserText) else strip_paths(str(value))
