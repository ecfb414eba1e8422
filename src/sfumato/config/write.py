"""Writing options into a configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sfumato.common.files import write_text
from sfumato.config.config_file import config_path
from sfumato.config.schema import THEMES, Config, by_theme, title, vocabulary
from sfumato.errors import UserError

LEFT_OUT = ("config_file", "output_config")


def write_config(config: Config) -> Path:
    """Write every option that differs from its default into --config_file and give its path.

    Secrets are left out. UserError if the file is there already.
    """
    assert config.run.config_file is not None, "load_config asks for it"
    path = config_path(config.run.config_file)
    if path.exists():
        raise UserError(f"--config_file: {path} is there already", fix="choose another name, or remove it")
    write_text(path, as_toml(config))
    return path


def as_toml(config: Config) -> str:
    """The changed options as TOML, a section per theme, in the spelling that the file takes."""
    wanted = [
        option
        for option in vocabulary().values()
        if option.name not in LEFT_OUT and not option.secret and config.changed(option.name)
    ]
    sections = []
    for theme, options in by_theme(wanted).items():
        values = getattr(config, theme).model_dump(mode="json", include={option.name for option in options})
        lines = [f"{option.name} = {toml_value(values[option.name])}" for option in options]
        sections.append(f"[{theme}]  # {title(theme)}\n" + "\n".join(lines) + "\n")
    assert set(THEMES) >= set(by_theme(wanted))
    return "\n".join(sections)


def toml_value(value: Any) -> str:
    """JSON's spelling of texts, numbers, switches and lists of them is TOML's, but for the delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
