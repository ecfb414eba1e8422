"""Where `sfumato compare` has the options of a run from: what this machine remembers, and what is given again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.config.command import CommandLine
from sfumato.config.paths import looks_like_path
from sfumato.config.run_record import read_run_record
from sfumato.config.schema import vocabulary
from sfumato.errors import UserError

DATA_SOURCES = ("train_data_dir", "reg_data_dir", "dataset_config", "in_json")
NEEDED_THEME = "model"  # the files of these options have to be there


def find_run_options(line: CommandLine, record: Path, folder: Path, name: str) -> tuple[dict[str, Any], list[str]]:
    """The options of the run that the command line does not give, and notes about what is not there any more.

    A configuration file of the command takes the place of all of them.
    """
    given = set(line.values)
    if "config_file" in given:
        return {}, []
    if not record.is_file():
        if "pretrained_model_name_or_path" not in given:
            raise UserError(
                f"with which options {name} in {folder} was trained is not known here: another machine trained it, or "
                "its folder was moved",
                code="compare-options-unknown",
                fix="give them again: --config_file FILE, or --pretrained_model_name_or_path FILE --train_data_dir DIR",
            )
        return read_method(folder, name), []
    values = dict(read_run_record(record))
    if given & {*DATA_SOURCES}:
        values = {option: value for option, value in values.items() if option not in DATA_SOURCES}
    return drop_missing(values, given)


def read_method(folder: Path, name: str) -> dict[str, Any]:
    """What the run trained, from the description in its folder."""
    from sfumato.track.report_facts import DESCRIPTION_SUFFIX, read_description

    path = folder / f"{name}{DESCRIPTION_SUFFIX}"
    method = read_description(path)["method"].partition(",")[0] if path.is_file() else ""
    return {"method": method} if method in vocabulary()["method"].choices else {}


def drop_missing(values: Mapping[str, Any], given: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The options whose files are there, and a note about each other one; UserError for a part of the model."""
    kept: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in values.items():
        missing = [] if name in given else list_missing_paths(name, value)
        if not missing:
            kept[name] = value
        elif vocabulary()[name].theme == NEEDED_THEME:
            raise UserError(
                f"the run was trained with --{name} {missing[0]}, which does not exist any more",
                code="compare-model-moved",
                fix=f"--{name} FILE_OR_FOLDER says where it is now",
            )
        else:
            notes.append(f"--{name} {missing[0].name} does not exist any more and is ignored.")  # paths are in no page
    return kept, notes


def list_missing_paths(name: str, value: Any) -> list[Path]:
    """The paths in an option's value that do not exist."""
    kind = vocabulary()[name].facts.path
    items = value if isinstance(value, tuple) else (value,)
    paths = [
        Path(str(item)) for item in items if kind and (kind not in ("model", "encoder") or looks_like_path(str(item)))
    ]
    return [path for path in paths if not path.exists()]
