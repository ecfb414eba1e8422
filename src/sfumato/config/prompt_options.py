"""The options in a line of a prompt file: ` --w 512`, with the names of sd-scripts' samples and of gen_img."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfumato.config.values import check_file_name, check_seed, get_last_part

MAX_STEPS = 1000
CLIP_VISION_MODEL = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"  # the other half of SDXL's second text encoder
MAX_IMAGE_SIDE = 65536  # pixels; far beyond what any model makes


@dataclass(frozen=True)
class LineOption:
    """What ` --x value` sets. `pattern` matches the start of the value; the rest is ignored. None: no value at all."""

    field: str
    pattern: re.Pattern[str]
    convert: Callable[[str], Any]


def _parse_number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def _parse_positive(text: str) -> float:
    if not _parse_number(text) > 0:
        raise ValueError
    return float(text)


def _parse_share(text: str) -> float:
    """Above 0, up to 1."""
    if not 0 < _parse_number(text) <= 1:
        raise ValueError
    return float(text)


def _parse_scale_or_none(text: str) -> float | None:
    return None if text.strip().lower() == "none" else _parse_number(text)


def _parse_numbers(text: str) -> tuple[float, ...]:
    return tuple(_parse_number(part) for part in text.split(","))


def _parse_side(text: str) -> int:
    if not 0 < int(text) <= MAX_IMAGE_SIDE:
        raise ValueError
    return int(text)


def _parse_offset(text: str) -> int:
    if int(text) > MAX_IMAGE_SIDE:
        raise ValueError
    return int(text)


def _parse_seeds(text: str) -> tuple[int, ...]:
    return tuple(check_seed(int(part)) for part in text.split(","))


def check_image_name(text: str) -> str:
    """ValueError for what no image can be named."""
    if not get_last_part(check_file_name(text.strip())):
        raise ValueError("is not a file name")
    return text.strip()


def _limit_steps(text: str) -> int:
    return min(max(int(text), 1), MAX_STEPS)


def _parse_count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def check_unsharp(text: str) -> str:
    """kernel size, sigma, strength and, if not on latents alone, 0 or 1; ValueError for anything else."""
    numbers = _parse_numbers(text)
    if len(numbers) not in (3, 4) or numbers[0] < 0 or numbers[1] <= 0:
        raise ValueError("is not a kernel size, a sigma above 0 and a strength, e.g. 9,0.5,0.5")
    return text.strip()


DIGITS, DECIMAL, ANY_TEXT = re.compile(r"\d+"), re.compile(r"[\d.]+"), re.compile(r".+")
SEED_LIST = re.compile(r"\d+(?:\s*,\s*\d+)*")
LINE_OPTIONS = {
    "n": LineOption("negative_prompt", ANY_TEXT, str),
    "w": LineOption("width", DIGITS, _parse_offset),
    "h": LineOption("height", DIGITS, _parse_offset),
    "d": LineOption("seeds", SEED_LIST, _parse_seeds),
    "s": LineOption("sample_steps", DIGITS, _limit_steps),
    "l": LineOption("scale", DECIMAL, _parse_number),
    "g": LineOption("guidance_scale", DECIMAL, _parse_number),
    "ss": LineOption("sample_sampler", ANY_TEXT, str.strip),
    "cn": LineOption("controlnet_image", ANY_TEXT, str.strip),
    "ref": LineOption("reference_image", ANY_TEXT, str.strip),
    "ctr": LineOption("cfg_trunc_ratio", ANY_TEXT, _parse_number),
    "rcfg": LineOption("renorm_cfg", ANY_TEXT, _parse_number),
    "fs": LineOption("flow_shift", ANY_TEXT, _parse_positive),
    "nl": LineOption("negative_scale", ANY_TEXT, _parse_scale_or_none),
    "am": LineOption("network_mul", ANY_TEXT, _parse_numbers),
    "c": LineOption("clip_prompt", ANY_TEXT, str),
    "p2": LineOption("prompt_2", ANY_TEXT, str),
    "f": LineOption("file_name", ANY_TEXT, check_image_name),
    "img": LineOption("init_image", ANY_TEXT, str.strip),
    "mk": LineOption("mask_image", ANY_TEXT, str.strip),
    "t": LineOption("strength", DECIMAL, _parse_share),
    "ow": LineOption("original_width", DIGITS, _parse_side),
    "oh": LineOption("original_height", DIGITS, _parse_side),
    "nw": LineOption("original_width_negative", DIGITS, _parse_side),
    "nh": LineOption("original_height_negative", DIGITS, _parse_side),
    "ct": LineOption("crop_top", DIGITS, _parse_offset),
    "cl": LineOption("crop_left", DIGITS, _parse_offset),
    "dsd1": LineOption("ds_depth_1", ANY_TEXT, int),
    "dst1": LineOption("ds_timesteps_1", ANY_TEXT, int),
    "dsd2": LineOption("ds_depth_2", ANY_TEXT, int),
    "dst2": LineOption("ds_timesteps_2", ANY_TEXT, int),
    "dsr": LineOption("ds_ratio", ANY_TEXT, _parse_share),
    "glt": LineOption("gradual_latent_timesteps", ANY_TEXT, int),
    "glr": LineOption("gradual_latent_ratio", ANY_TEXT, _parse_share),
    "gls": LineOption("gradual_latent_ratio_step", ANY_TEXT, _parse_positive),
    "gle": LineOption("gradual_latent_every_n_steps", ANY_TEXT, _parse_count),
    "glsn": LineOption("gradual_latent_s_noise", ANY_TEXT, _parse_number),
    "glus": LineOption("gradual_latent_unsharp_params", ANY_TEXT, check_unsharp),
}
