"""A preset of LyCORIS from a TOML file: which layers get adapters, by classes and names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.common.json_toml import decode_toml
from sfumato.common.names import LYCORIS_CLASSES, LYCORIS_PRESETS, LycorisPreset
from sfumato.common.registry import did_you_mean
from sfumato.common.text_files import read_text_file
from sfumato.errors import UserError

PRESET_LISTS = (
    "unet_target_module", "unet_target_name", "text_encoder_target_module", "text_encoder_target_name", "exclude_name",
)  # fmt: skip
FLAGS = ("enable_conv", "use_fnmatch", "lycoris_prefix")
MAPS = ("module_algo_map", "name_algo_map")  # other kinds and ranks for some layers
NO_LAYER = r"(?!)"


def read_preset_file(path: Path) -> tuple[LycorisPreset, list[str]]:
    """The preset, and patterns of names that get no adapter.

    UserError for a file that cannot be read, keys that are not known, and what no preset here can say.
    """
    content = read_content(path)
    lists = {name: [str(each) for each in content.get(name, ())] for name in PRESET_LISTS}
    default = LYCORIS_PRESETS["full"]
    kinds = find_layer_kinds(path, lists["unet_target_module"])
    text = find_layer_kinds(path, lists["text_encoder_target_module"])
    if "unet_target_module" not in content:
        kinds = {"transformers", "convolutions"}
    has_text = bool(text) if "text_encoder_target_module" in content else default.has_text_encoders
    layers = "|".join(sorted((kinds | text) - {"transformers", "convolutions"}))
    if "transformers" in kinds:
        layers = ""
        if len(text) == 1:
            raise UserError(
                f"{path}: all layers of the denoiser's blocks with some of the text encoders' cannot be adapted",
                code="lycoris-preset-text-classes",
                fix="classes of attention and of feed-forward layers in text_encoder_target_module, or none",
            )
    elif not layers and "convolutions" not in kinds:
        layers = NO_LAYER
    uses_kernels = "convolutions" in kinds and bool(content.get("enable_conv", True))
    names = [make_name_pattern(each, content) for each in lists["unet_target_name"]]
    preset = LycorisPreset(
        has_convolutions=uses_kernels,
        has_text_encoders=has_text,
        layers=layers,
        more_layers="|".join(names) if "unet_target_name" in content else default.more_layers,
        has_transformers=kinds != {"convolutions"},
        has_pointwise="convolutions" in kinds and not uses_kernels,
    )
    return preset, [make_name_pattern(each, content) for each in lists["exclude_name"]]


def read_content(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(
            f"--network_args preset={path}: there is no such file",
            code="lycoris-preset-missing",
            fix=f"a TOML file, or one of {', '.join(LYCORIS_PRESETS)}",
        )
    try:
        content = decode_toml(read_text_file(path))
    except ValueError as error:
        raise UserError(f"{path} is no TOML file: {error}", code="lycoris-preset-damaged") from None
    known = (*PRESET_LISTS, *FLAGS, *MAPS)
    for name, value in content.items():
        if name not in known:
            raise UserError(
                f"{path}: presets have no key {name!r}", code="lycoris-preset-key", fix=did_you_mean(name, known)
            )
        if name in PRESET_LISTS and not isinstance(value, list):
            raise UserError(f"{path}: {name} is no list of names", code="lycoris-preset-value")
    given = [name for name in MAPS if content.get(name)]
    if given:
        raise UserError(
            f"{path}: {given[0]} gives layers kinds of adapters of their own; here a run has one kind",
            code="lycoris-preset-algo-map",
            fix="remove it; ranks of single layers are --network_args network_reg_dims=EXPRESSION=RANK",
        )
    return content


def find_layer_kinds(path: Path, classes: Sequence[str]) -> set[str]:
    """What these classes of sd-scripts' and LyCORIS' models are here: whole blocks, or expressions for layers."""
    unknown = [name for name in classes if name not in LYCORIS_CLASSES]
    if unknown:
        raise UserError(
            f"{path}: the class {unknown[0]} is of no model here",
            code="lycoris-preset-class",
            fix=did_you_mean(unknown[0], LYCORIS_CLASSES),
        )
    return {LYCORIS_CLASSES[name] for name in classes}


def make_name_pattern(name: str, content: Mapping[str, Any]) -> str:
    """A regular expression for all of a layer's name; those of LyCORIS fit its beginning."""
    if content.get("use_fnmatch"):
        return fnmatch.translate(name)
    try:
        re.compile(name)
    except re.error as error:
        raise UserError(
            f"the preset's {name!r} is not a regular expression ({error})", code="lycoris-preset-pattern"
        ) from error
    return f"(?:{name})(?:\\..*)?"
