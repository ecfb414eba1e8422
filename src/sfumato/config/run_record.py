"""The options of a run, remembered in the user's cache folder: they hold paths, which the run's own files never do.

So a command that is given the folder of a run finds its model and its images again, on the machine that trained it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.common.files import write_text
from sfumato.config.config_file import read_config_file
from sfumato.config.frozen import FrozenAdapter
from sfumato.config.option_source import check_values
from sfumato.config.schema import Config, vocabulary
from sfumato.config.secrets import collect_secrets, redact
from sfumato.config.write import format_toml
from sfumato.errors import Problems

# What belongs to one start of a program, or to how a run is shown and shared.
THEMES_OF_THE_START = ("hub", "log", "metadata", "processes")
OPTIONS_OF_THE_START = ("resume", "network_weights", "dim_from_weights", "output_dir", "output_name")


def find_run_record(cache_dir: Path, output_dir: Path, name: str) -> Path:
    """The file for a run of this name in this folder; it need not exist."""
    key = f"{output_dir.resolve()}\0{name}".encode("utf-8", "surrogatepass")
    return cache_dir / "runs" / f"{hashlib.blake2b(key, digest_size=16).hexdigest()}.toml"


def write_run_record(config: Config, cache_dir: Path) -> None:
    """Remember the options, without secrets and with absolute paths. OSError where the folder cannot be written."""
    assert config.save.output_dir is not None
    path = find_run_record(cache_dir, config.save.output_dir, config.save.output_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, redact(format_toml(with_absolute_paths(config)), collect_secrets(config)))


def with_absolute_paths(config: Config) -> Config:
    """Paths that mean the same in every working folder; names on the hub stay."""
    values = {option: config.value(option) for option in vocabulary() if config.is_changed(option)}
    absolute: dict[str, Any] = {}
    for name, value in values.items():
        names_model = vocabulary()[name].facts.path in ("model", "encoder")
        absolute[name] = make_absolute(value, names_model=names_model)
    return config.with_values({name: value for name, value in absolute.items() if value != values[name]})


def make_absolute(value: Any, *, names_model: bool) -> Any:
    """A path, or several of them; anything else stays. names_model: whether a text is a path where it exists."""
    match value:
        case tuple():
            return tuple(make_absolute(item, names_model=names_model) for item in value)
        case FrozenAdapter(path=path):
            return replace(value, path=path.absolute())
        case Path():
            return value.absolute()
        case str() if names_model and Path(value).exists():
            return str(Path(value).absolute())
        case _:
            return value


def read_run_record(path: Path) -> Mapping[str, Any]:
    """Option -> its value, of those that another command may have a use for. Raises UserError for a damaged file."""
    problems = Problems()
    source = read_config_file(path, problems)
    values = check_values(source, problems) if source is not None else {}
    problems.raise_all()
    known = vocabulary()
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if known[name].theme not in THEMES_OF_THE_START and name not in OPTIONS_OF_THE_START:
            kept[name] = value
    return kept
