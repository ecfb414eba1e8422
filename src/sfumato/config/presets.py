"""Presets: configuration files that come with the program, one for each model, task and card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sfumato.common.registry import did_you_mean
from sfumato.common.text_files import read_text_file
from sfumato.config.config_file import read_config_file
from sfumato.config.option_source import SCRIPT_NAME_OPTIONS, OptionSource
from sfumato.errors import Problems, UserError

FOLDER = Path(__file__).parents[1] / "presets"
INDEX = FOLDER / "presets.json"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One preset, and what is known of it. peak, caching: rehearsed peaks of a step and of filling caches, bytes."""

    name: str
    title: str
    task: str
    card: int  # GB, as cards are sold
    peak: int
    caching: int

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.toml"

    @property
    def needs(self) -> int:
        """Bytes of the stage that needs most."""
        return max(self.peak, self.caching)


@cache
def list_presets() -> Mapping[str, Preset]:
    """All of them by name, in the order of models, tasks and cards."""
    rows = json.loads(read_text_file(INDEX))
    return {row["name"]: Preset(**row) for row in rows}


def find_preset(name: str) -> Preset:
    """Raises UserError with the nearest names."""
    if name not in list_presets():
        raise UserError(
            f"there is no preset {name!r}", code="preset-unknown", fix=did_you_mean(name, list(list_presets()))
        )
    return list_presets()[name]


def read_preset_options(name: str | None, defaults: Mapping[str, Any], problems: Problems) -> OptionSource:
    """The options of a preset; none without a name.

    defaults: what a script sets. A preset of another family or method than the script's becomes a problem.
    """
    empty = OptionSource(source="preset", typed=True)
    if name is None:
        return empty
    with problems.catch():
        source = read_config_file(find_preset(name).path, problems)
        assert source is not None, "a preset that comes along can be read"
        source.source = "preset"
        for option in SCRIPT_NAME_OPTIONS:
            if option in defaults and source.values.pop(option, defaults[option]) != defaults[option]:
                problems.add(
                    f"preset {name} is for another {option} than {defaults[option]}, which the script's name says",
                    code="preset-of-another-script",
                    fix="take the preset's own script, or `sfumato train`",
                )
        return source
    return empty
