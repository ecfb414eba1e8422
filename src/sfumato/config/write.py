"""Writes options to a configuration file: those of the command line, or with what a command has found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sfumato.common.files import check_writable, write_text
from sfumato.config.config_file import resolve_config_path
from sfumato.config.option_table import group_options
from sfumato.config.schema import Config, theme_title, vocabulary
from sfumato.errors import UserError

NOT_WRITTEN = ("config_file", "preset", "output_config", "plan", "dry_run")


def write_config(config: Config) -> Path:
    """Write every option that differs from its default, except secrets, to --config_file; gives its path.

    Raises UserError if the file exists, or is called a JSON file.
    """
    assert config.run.config_file is not None, "load_config requires it"
    return write_options(config, config.run.config_file, option="--config_file")


def write_options(config: Config, path: Path, *, option: str) -> Path:
    """The same to the file that `option` names; .toml is appended where its name has no ending."""
    path = check_new_config(path, option=option)
    write_text(path, format_toml(config))
    return path


def check_new_config(path: Path, *, option: str) -> Path:
    """The whole path of a configuration file that can be written. Raises UserError for any other."""
    path = resolve_config_path(path)
    if path.suffix.lower() != ".toml":
        what = f"{option}: {path} cannot be written, options are written in TOML"
        raise UserError(what, code="config-written-as-toml", fix=f"give {path.with_suffix('.toml')}")
    if path.exists():
        raise UserError(
            f"{option}: {path} already exists", code="config-file-exists", fix="choose another name, or remove it"
        )
    check_writable(path.parent, option=option)
    return path


def format_toml(config: Config) -> str:
    """The changed options as TOML, one section per theme."""
    changed = [
        option
        for option in vocabulary().values()
        if option.name not in NOT_WRITTEN and not option.secret and config.is_changed(option.name)
    ]
    sections: list[str] = []
    for theme, options in group_options(changed).items():
        values = getattr(config, theme).model_dump(mode="json", include={option.name for option in options})
        lines = [f"{option.name} = {format_toml_value(values[option.name])}" for option in options]
        sections.append(f"[{theme}]  # {theme_title(theme)}\n" + "\n".join(lines) + "\n")
    return "\n".join(sections)


def format_toml_value(value: Any) -> str:
    """A text, number, boolean or list in TOML, which spells them as JSON does, except for the delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
