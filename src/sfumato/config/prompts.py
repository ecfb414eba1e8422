"""Reads prompt files for samples: .txt lines with options, .toml and .json, all into Prompts."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sfumato.common.json_toml import decode_json, decode_toml
from sfumato.common.registry import did_you_mean
from sfumato.common.text import has_lone_surrogate
from sfumato.common.text_files import SAVE_AS_UTF8, read_text_file
from sfumato.config.file_syntax import suggest_json_fix, suggest_toml_fix
from sfumato.config.prompt_options import LINE_OPTIONS, MAX_IMAGE_SIDE, check_image_name, check_unsharp
from sfumato.config.values import check_seed
from sfumato.errors import UserError

SAMPLER_NAMES = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip
MAX_PROMPT_NUMBER = 1e30  # in either direction
OWN_FIELDS = ("unset", "notes")  # which no file sets


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and the settings of its image; None means the default, of the command or of the family."""

    prompt: str
    negative_prompt: str = ""
    prompt_2: str | None = None  # what the second text encoder reads instead
    clip_prompt: str | None = None  # what the pooled vector is made of instead
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    seeds: tuple[int, ...] = ()  # where there are several: of an image each, in order
    sample_steps: int | None = None
    scale: float | None = None  # classifier-free guidance
    negative_scale: float | None = None  # strength of the negative prompt alone
    guidance_scale: float | None = None  # embedded guidance
    sample_sampler: str | None = None
    parts: tuple[str, ...] = ()  # the prompts of parts of the image, where there are several
    network_regional_mask_max_color_codes: int | None = None  # parts that the mask's colors stand for, not its channels
    network_mul: tuple[float, ...] = ()  # multipliers of the adapters, in order; the last counts for the rest
    init_image: str | None = None  # a file that the image starts from
    mask_image: str | None = None  # a file that says where it may change
    strength: float | None = None  # share of the steps that are made from there
    clip_vision_strength: float | None = None  # factor of that image's vector, in the place of the text's pooled one
    clip_vision_model: str | None = None  # what gives the vector
    controlnet_image: str | None = None
    further_control_images: tuple[str, ...] = ()  # of the second ControlNet or LLLite and those after it
    control_net_multipliers: tuple[float, ...] = ()  # their strengths, in their order; 1 where missing
    control_net_ratios: tuple[float, ...] = ()  # the share of the steps up to which each acts
    control_net_starts: tuple[float, ...] = ()  # the share from which it does
    control_net_preps: tuple[str, ...] = ()  # what makes its image of the file
    reference_image: str | None = None  # a file, for models that edit it
    cfg_trunc_ratio: float | None = None  # classifier-free guidance only before this share of the steps
    renorm_cfg: float | None = None  # maximum norm of the guided prediction, relative to that of the prompt's
    flow_shift: float | None = None  # timestep shift of flow models
    original_width: int | None = None  # sizes and crop that some models are told
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    ds_depth_1: int | None = None  # Deep Shrink: the block before which the features are made smaller
    ds_timesteps_1: int | None = None  # from the first timestep to this one
    ds_depth_2: int | None = None  # the same after that, to the second timestep
    ds_timesteps_2: int | None = None
    ds_ratio: float | None = None
    gradual_latent_timesteps: int | None = None  # Gradual Latent: the timestep at which the image begins to grow
    gradual_latent_ratio: float | None = None
    gradual_latent_ratio_step: float | None = None
    gradual_latent_every_n_steps: int | None = None
    gradual_latent_s_noise: float | None = None
    gradual_latent_unsharp_params: str | None = None
    highres_fix_scale: float | None = None  # size of a first stage, from which the image is made
    highres_fix_steps: int | None = None
    highres_fix_strength: float | None = None  # of the first stage, where it starts from an image
    highres_fix_save_1st: bool | None = None
    highres_fix_latents_upscaling: bool | None = None
    highres_fix_upscaler: str | None = None  # weights of a network that sharpens the enlarged image's latents
    highres_fix_disable_control_net: bool | None = None
    noise_offset: float | None = None  # added to each channel of the first noise, times a normal number
    pyramid_noise_discount: float | None = None  # weight of each coarser level of noise in the first noise
    force_scheduler_zero_steps_offset: bool | None = None
    file_name: str | None = None
    unset: tuple[str, ...] = ()  # fields that have no value here, whatever the defaults
    notes: tuple[str, ...] = ()  # what was ignored in the file, and why

    @property
    def texts(self) -> list[tuple[str, bool]]:
        """All that text encoders may read for it, and whether it is a negative prompt."""
        further = [text for text in (self.prompt_2, self.clip_prompt) if text is not None]
        negative = [self.negative_prompt, *([] if self.negative_scale is None else [""])]
        return [*((text, False) for text in (self.prompt, *further)), *((text, True) for text in negative)]

    def apply_defaults(self, defaults: Mapping[str, Any]) -> Prompt:
        """A copy with the values of `defaults` where this prompt has none."""
        missing = {name: value for name, value in defaults.items() if vars(self)[name] in (None, "", ())}
        return replace(self, **{name: value for name, value in missing.items() if name not in self.unset})


OPTION_START = re.compile(r"\s--")  # also after a tab or a full-width space
OPTION_PARTS = re.compile(r"(\S*)\s*(.*)", re.DOTALL)  # name and value
LINE_END = re.compile(r"\r\n|\r|\n")


def parse_line(line: str, *, where: str) -> Prompt:
    """A prompt and its ` --x value` options; names match in any case, the last value of a repeated option counts.

    As in sd-scripts, an invalid option is ignored and the others are used; the prompt's notes name it. The words before
    the first option are never read as an option. A line of options alone is an empty prompt, which is noted.
    """
    text, *options = OPTION_START.split(line.strip())
    notes: list[str] = []
    if text.startswith("--") and (text[2:].split() or [""])[0].lower() in LINE_OPTIONS:
        text, options = "", [text[2:], *options]
        notes.append(f"{where}: has options alone, so its prompt is empty; put them on the line of their prompt")
    values: dict[str, Any] = {"prompt": text}
    for option in options:
        read, note = _parse_option(option, where)
        values |= read
        notes += [note] if note else []
    return _make_prompt({**values, "notes": tuple(notes)}, where)


def _parse_option(option: str, where: str) -> tuple[dict[str, Any], str]:
    """`x value` -> the fields that it sets, and a note about what is ignored of it."""
    name, value = OPTION_PARTS.findall(option)[0]
    if name.lower() not in LINE_OPTIONS:
        hint = did_you_mean(name, LINE_OPTIONS) if name.isalpha() else "options are written ` --w 512`"
        return {}, f"{where}: {f'--{option}'!r} is not an option and is ignored ({hint})"
    line_option = LINE_OPTIONS[name.lower()]
    match = line_option.pattern.match(value)
    try:
        converted = line_option.convert(match[0]) if match else None
    except ValueError:
        match = converted = None
    if not match:
        return {}, f"{where}: --{name} {value!r} is not a valid value and is ignored"
    note = f"{where}: of --{name} {value!r} only {match[0]!r} is used" if match.end() < len(value.rstrip()) else ""
    if converted is None:
        return {line_option.field: None, "unset": (line_option.field,)}, note
    if line_option.field == "seeds":
        return {"seed": converted[0], "seeds": converted if len(converted) > 1 else ()}, note
    return {line_option.field: converted}, note


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file, in order; raises UserError that names file and line or entry."""
    try:
        text = read_text_file(path)
    except OSError as error:
        what = f"cannot read the prompt file {path} ({error.strerror})"
        raise UserError(what, code="prompt-file-unreadable") from error
    readers = {".txt": _read_txt, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a prompt file ends in .txt, .toml or .json", code="prompt-file-suffix")
    try:
        return readers[path.suffix.lower()](text, str(path))
    except ValueError as error:
        fix = ""
        if isinstance(error, tomllib.TOMLDecodeError):
            fix = suggest_toml_fix(text, error)
        elif isinstance(error, json.JSONDecodeError):
            fix = suggest_json_fix(error)
        raise UserError(f"{path}: {error}", code="prompt-file-invalid", fix=fix) from error


def _read_txt(text: str, where: str) -> list[Prompt]:
    """One prompt per line; a line that starts with # is a comment."""
    prompts: list[Prompt] = []
    for number, line in enumerate(LINE_END.split(text), 1):
        if line.strip() and not line.startswith("#"):
            prompts.append(parse_line(line, where=f"{where}:{number}"))
    return prompts


def _read_toml(text: str, where: str) -> list[Prompt]:
    """[prompt] holds defaults, [[prompt.subset]] the prompts, whose values take precedence."""
    content = decode_toml(text)
    if not content:
        return []
    table = content.get("prompt", {})
    if not isinstance(table, dict) or not isinstance(table.get("subset"), list):
        what = f"{where}: no [[prompt.subset]]"
        raise UserError(what, code="prompt-file-without-subsets", fix="write one for each image, with prompt = ...")
    defaults = {name: value for name, value in table.items() if name != "subset"}
    prompts: list[Prompt] = []
    for i, subset in enumerate(table["subset"]):
        entry = f"{where}: prompt.subset[{i}]"
        prompts.append(_make_prompt(_drop_unknown_keys({**defaults, **subset}, entry), entry))
    return prompts


def _read_json(text: str, where: str) -> list[Prompt]:
    """A list of objects and of texts, which are parsed as lines of a .txt file."""
    entries = decode_json(text) if text.strip() else []
    if not isinstance(entries, list) or not all(isinstance(entry, dict | str) for entry in entries):
        what = f"{where}: not a list of prompts"
        raise UserError(what, code="prompt-file-without-list", fix='write [{"prompt": "..."}, ...]')
    prompts: list[Prompt] = []
    for i, entry in enumerate(entries):
        place = f"{where}[{i}]"
        if isinstance(entry, str):
            prompts.append(parse_line(entry, where=place))
        else:
            prompts.append(_make_prompt(_drop_unknown_keys(entry, place), place))
    return prompts


def _drop_unknown_keys(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values without unknown keys, which the notes name."""
    names = [field.name for field in fields(Prompt) if field.name not in OWN_FIELDS]
    known: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in values.items():
        if name in names:
            known[name] = tuple(value) if isinstance(value, list) else value
        elif name != "subset":
            notes.append(f"{where}: {name} is not a key of a prompt and is ignored ({did_you_mean(name, names)})")
    return {**known, "notes": tuple(notes)}


def _make_prompt(values: Mapping[str, Any], where: str) -> Prompt:
    """Check the types and limits of the values; raises UserError."""
    for field in fields(Prompt):
        if field.name in values and field.name not in OWN_FIELDS and values[field.name] is not None:
            _check_type(field.name, str(field.type).removesuffix(" | None"), values[field.name], where)
    if "prompt" not in values:
        raise UserError(f"{where}: has no prompt", code="prompt-text-missing")
    _check_texts(values, where)
    _check_numbers(values, where)
    return Prompt(**values)


def _check_texts(values: Mapping[str, Any], where: str) -> None:
    for name in ("prompt", "negative_prompt"):
        if has_lone_surrogate(values.get(name, "")):
            raise UserError(f"{where}: {name} has letters that are not UTF-8", code="prompt-not-utf8", fix=SAVE_AS_UTF8)
    sampler = values.get("sample_sampler", SAMPLER_NAMES[0])
    if sampler not in SAMPLER_NAMES:
        fix = did_you_mean(sampler, SAMPLER_NAMES)
        raise UserError(f"{where}: unknown sampler {sampler!r}", code="prompt-sampler-unknown", fix=fix)
    try:
        check_unsharp(values.get("gradual_latent_unsharp_params") or "0,1,0")
    except ValueError as error:
        what = f"{where}: gradual_latent_unsharp_params {error}"
        raise UserError(what, code="prompt-unsharp-malformed", fix='write e.g. "9,0.5,0.5"') from None
    try:
        check_image_name(values.get("file_name") or "image")
    except ValueError as error:
        what = f"{where}: file_name {values['file_name']!r} {error}"
        raise UserError(what, code="prompt-file-name-invalid", fix='write e.g. "cat.png"') from None


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
    for name in ("width", "height", "sample_steps", "gradual_latent_every_n_steps", "highres_fix_steps"):
        if (1 if values.get(name) is None else values[name]) < 1:
            raise UserError(f"{where}: {name} is below 1", code="prompt-value-below-one")
    for name in ("width", "height"):
        if (values.get(name) or 1) > MAX_IMAGE_SIDE:
            raise UserError(f"{where}: {name} is above {MAX_IMAGE_SIDE}", code="prompt-size-too-large")
    for name in ("strength", "ds_ratio", "gradual_latent_ratio", "highres_fix_scale", "highres_fix_strength"):
        if not 0 < (values.get(name) or 1) <= 1:
            raise UserError(f"{where}: {name} is not between 0 and 1", code="prompt-value-not-a-share")
    for seed in (values.get("seed"), *values.get("seeds", ())):
        _check_seed(seed, where)
    if values.get("flow_shift") is not None and not values["flow_shift"] > 0:
        raise UserError(f"{where}: flow_shift is not above 0", code="prompt-flow-shift-not-positive")


def _check_seed(seed: int | None, where: str) -> None:
    try:
        check_seed(seed or 0)
    except ValueError as error:
        raise UserError(f"{where}: seed {seed} {error}", code="prompt-seed-too-large") from None


def _check_type(name: str, type_name: str, value: object, where: str) -> None:
    inner, is_list = type_name.removeprefix("tuple[").removesuffix(", ...]"), type_name.startswith("tuple[")
    accepted = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}[inner]
    for item in value if is_list and isinstance(value, tuple) else (value,):
        is_wrong = not isinstance(item, accepted) or isinstance(item, bool) != (inner == "bool")
        if is_wrong or is_list != isinstance(value, tuple):
            wanted = f"a list of {inner}" if is_list else inner
            raise UserError(f"{where}: {name} takes {wanted}, not {value!r}", code="prompt-value-wrong-type")
        if isinstance(item, int | float) and not -MAX_PROMPT_NUMBER < item < MAX_PROMPT_NUMBER:
            raise UserError(f"{where}: {name} is not a number that can be meant", code="prompt-value-not-finite")
