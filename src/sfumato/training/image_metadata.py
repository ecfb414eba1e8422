"""A generated image's file: its pixels, its request, and the `sfumato generate` command that makes it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sfumato.common import files
from sfumato.common.text import strip_paths
from sfumato.config import Config
from sfumato.config.precision_rules import LOW_PRECISION
from sfumato.config.prompts import parse_line
from sfumato.config.schema import vocabulary
from sfumato.config.secrets import collect_secrets, redact
from sfumato.config.wildcards import has_variants
from sfumato.families.blueprint import Sampling
from sfumato.sampling.request import ImageRequest

# Options that an image depends on: the base model's but those that only training reads, and these.
OTHER_OPTIONS = ("base_weights", "base_weights_multiplier", "mixed_precision", "prompt_weighting", "zero_terminal_snr")
OTHER_OPTIONS += (*LOW_PRECISION, "rotate_inputs", "discrete_flow_shift")  # the last in some models' previews
TRAINING_OPTIONS = ("guidance_scale", "pos_emb_random_crop_rate")


SOME_HAVE = (
    "prompt_2",
    "clip_prompt",
    "negative_scale",
    "multipliers",
    "start",
    "sizes",
    "shrink",
    "growth",
    "highres",
    "control",
    "control_mask",
    "regions",
    "first_noise",
    "force_scheduler_zero_steps_offset",
)
EXIF_DESCRIPTION = 270  # the tag of an image's description
ASKING = ("ds_depth_1", "gradual_latent_timesteps")
COMMAND_NAMES = {"init_image": "image_path", "mask_image": "mask_path", "region_mask": "mask_path"}
A1111_SAMPLERS = {
    "ddim": "DDIM", "pndm": "PLMS", "lms": "LMS", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun",
    "dpm_2": "DPM2", "dpm_2_a": "DPM2 a", "dpmsolver": "DPM++ 2M", "dpmsolver++": "DPM++ 2M", "dpmsingle": "DPM++ 2S",
}  # fmt: skip


def save_image(path: Path, image: Tensor, text: Mapping[str, str]) -> None:
    """image (3, H, W) in [-1, 1] -> a PNG with `text` in it, or a lossless WebP with its parameters."""
    pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    if path.suffix.lower() == ".webp":
        exif = Image.Exif()
        exif[EXIF_DESCRIPTION] = text.get("parameters", "")
        options: dict[str, Any] = {"format": "WEBP", "lossless": True, "exif": exif}
    else:
        options = {"format": "PNG", "pnginfo": PngInfo()}
        for name, value in text.items():
            options["pnginfo"].add_text(name, value)
    with files.write_atomically(path) as temporary:
        Image.fromarray(pixels).save(temporary, **options)


def image_metadata(request: ImageRequest) -> dict[str, str]:
    """All that an image depends on besides the model, as text; of an absolute path only the last name."""
    named = {name: strip_paths(vars(request)[name]) for name in ("reference_image", "control_image")}
    values = list_settings(request) | named
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return text | {"parameters": format_parameters(request)}


def list_settings(request: ImageRequest) -> dict[str, object]:
    """The request's values by name; of those that only some images have the ones that it has."""
    values = {name: value for name, value in vars(request).items() if name not in SOME_HAVE}
    further = {name: vars(request)[name] for name in ("prompt_2", "clip_prompt", "negative_scale")}
    further["network_mul"] = request.multipliers or None
    further["control_mask"] = strip_paths(request.control_mask)
    further["force_scheduler_zero_steps_offset"] = request.force_scheduler_zero_steps_offset or None
    for settings in request.settings:
        further |= vars(settings)
    for name in ("init_image", "mask_image", "region_mask", "highres_fix_upscaler", "clip_vision_model"):
        further[name] = strip_paths(str(further.get(name) or ""))
    further["further_control_images"] = [strip_paths(name) for name in request.control.further_control_images] or None
    return values | {name: value for name, value in further.items() if value not in (None, "", ())}


def format_parameters(request: ImageRequest) -> str:
    """The recipe as AUTOMATIC1111's web UI writes and reads it, ComfyUI and image sites, too."""
    values: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": A1111_SAMPLERS.get(request.sampler.removeprefix("k_")),
    }
    values |= {"CFG scale": f"{request.scale:g}", "Seed": request.seed, "Size": f"{request.width}x{request.height}"}
    if request.guidance is not None:
        values["Distilled CFG Scale"] = f"{request.guidance:g}"
    strength = next((each.strength for each in (request.start, request.highres) if each is not None), None)
    if strength is not None:
        values["Denoising strength"] = f"{strength:g}"
    lines = [request.prompt, *([f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in values.items())])


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
    """Every option that images depend on and that is not at its default, or that was turned off: files declare some."""
    known = vocabulary()
    names = [name for name, option in known.items() if option.theme == "model" and not option.facts.no_effect]
    return {
        name: config.value(name)
        for name in (*names, *OTHER_OPTIONS)
        if (config.is_changed(name) or (config.value(name) is False and config.source(name) != "default"))
        and name not in TRAINING_OPTIONS
        and not known[name].secret
    }


def request_options(request: ImageRequest, defaults: Sampling) -> dict[str, object]:
    """The options of `sfumato generate` for a request; None where the request has no value."""
    text = request.prompt
    options: dict[str, object] = {
        "prompt": UserText(text),
        "plain_prompt": request.regions is None and needs_plain_prompt(text),
    }
    options |= {"negative_prompt": UserText(request.negative_prompt)} if request.negative_prompt else {}
    options |= {"W": request.width, "H": request.height, "seed": request.seed, "steps": request.steps}
    options |= {"scale": request.scale, "guidance": request.guidance}
    for name in ("cfg_trunc_ratio", "renorm_cfg"):
        options |= {name: vars(request)[name]} if vars(request)[name] != vars(defaults)[name] else {}
    options |= {"flow_shift": request.flow_shift, "reference_image": request.reference_image or None}
    if request.control_image:
        options["control_net_image"] = [request.control_image, *request.control.further_control_images]
        options["mask_path"] = request.control_mask or None
    options |= list_further_options(request)
    if request.sampler != vocabulary()["sample_sampler"].default:
        options["sample_sampler"] = request.sampler
    return options


def needs_plain_prompt(text: str) -> bool:
    """Whether a prompt would be read as something else: options at its end, variants in braces."""
    return (
        parse_line(text, where="").prompt != text
        or has_variants(text)
        or "\\{" in text
        or "\\}" in text
        or " AND " in text
    )


def list_further_options(request: ImageRequest) -> dict[str, object]:
    """Those of settings that only some images have, where they differ from their defaults."""
    options: dict[str, Any] = {"negative_scale": request.negative_scale, "network_mul": request.multipliers or None}
    for name in ("prompt_2", "clip_prompt"):
        text = vars(request)[name]
        options |= {name: None if text is None else UserText(text)}
    options |= {"force_scheduler_zero_steps_offset": request.force_scheduler_zero_steps_offset}
    for settings in request.settings:
        required: dict[str, Any] = {
            name: value for name, value in vars(settings).items() if not has_default(settings, name)
        }
        options |= {COMMAND_NAMES.get(name, name): value for name, value in required.items()}
    for name in ("further_control_images", "parts"):  # with the first one, in the prompt
        options.pop(name, None)
    return {name: value for name, value in options.items() if value not in (None, "", ())}


def has_default(settings: Any, name: str) -> bool:
    """Whether a value is what the command takes without being told; the first of a kind is what asks for it."""
    (field,) = (field for field in fields(settings) if field.name == name)
    return vars(settings)[name] == field.default and name not in ASKING


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
