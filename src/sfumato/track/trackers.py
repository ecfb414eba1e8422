"""Curves: one JSON object per step always, TensorBoard and wandb where they are asked for."""

from __future__ import annotations

import importlib
import json
import logging
import math
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from sfumato.common import files
from sfumato.config import LogOptions
from sfumato.errors import UserError
from sfumato.formats.metadata import without_paths

log = logging.getLogger(__name__)
Value = float | Sequence[float]  # a list is for the journal file alone
NOTHING: Mapping[str, Any] = MappingProxyType({})
SECTIONS = ("wandb", "tensorboard")  # of --log_tracker_config
PROJECT = "network_train"  # the field's name where --log_tracker_name gives none
DISCREET = {  # wandb's settings against sending the command line, paths, user, host, messages and source
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "console": "off",
}


class Tracker(Protocol):
    """Where a step's numbers go, by the names of the field's series: loss/average, lr/unet, ..."""

    def log(self, step: int, values: Mapping[str, Value]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One line per step, written at once; a resumed run takes back the lines of steps that it does again.

    Numbers that JSON lacks (nan, inf) become null. A full disk costs lines, never the run.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path, self.torn, self.warned = path, False, False
        kept = [line for line in _lines(path) if _step(line) <= start] if start else []
        files.write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("ab", buffering=0)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self._write(json.dumps({"step": step, **row}))

    def close(self) -> None:
        self.file.close()

    def _write(self, line: str) -> None:
        """A torn line is ended by the next, so that it spoils none but itself."""
        content = (("\n" if self.torn else "") + line + "\n").encode()
        written, why = 0, "no room"
        try:
            written = self.file.write(content)
        except OSError as error:
            why = error.strerror or why
        if written < len(content) and not self.warned:
            log.warning("%s could not be written (%s); training goes on", self.path, why)
            self.warned = True
        if written:
            self.torn = written < len(content)


class TensorBoard:
    """Event files for TensorBoard; a resumed run hides the events of the steps that it does again."""

    def __init__(self, folder: Path, start: int, arguments: Mapping[str, Any] = NOTHING) -> None:
        writer = _import("torch.utils.tensorboard.writer", "TensorBoard", "tensorboard").SummaryWriter
        given = {"purge_step": start + 1 if start else None, "flush_secs": 30, **arguments}
        try:
            self.writer = writer(str(folder), **given)
        except TypeError as error:
            raise UserError(f"--log_tracker_config: [tensorboard] {error}") from error
        except OSError as error:
            raise UserError(f"--logging_dir: cannot write into {folder} ({error.strerror})") from error

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def text(self, name: str, content: str) -> None:
        self.writer.add_text(name, content)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run at wandb, which learns the curves and `facts` and nothing else: no command line, code, host or messages.

    Raises OSError for whatever wandb refuses or loses, so that a journal goes on without it.
    """

    def __init__(
        self, options: LogOptions, folder: Path, facts: Mapping[str, str], arguments: Mapping[str, Any] = NOTHING
    ) -> None:
        wandb = _import("wandb", "wandb", "wandb")
        self.failures = (wandb.Error, RuntimeError, ValueError, TimeoutError)  # TypeError: a wrong name in the file
        key = options.wandb_api_key
        settings = {**DISCREET, **arguments.get("settings", {})} | ({"api_key": key.get_secret_value()} if key else {})
        given = {"project": options.log_tracker_name or PROJECT, "dir": str(folder), "config": dict(facts), **arguments}
        if options.wandb_run_name:
            given["name"] = options.wandb_run_name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(**{**given, "settings": wandb.Settings(**settings)})
        except TypeError as error:
            raise UserError(f"--log_tracker_config: [wandb] {error}") from error
        except self.failures as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        try:
            self.run.log({name: value for name, value in values.items() if isinstance(value, int | float)}, step=step)
        except self.failures as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        try:
            self.run.finish()
        except self.failures as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error


def check_trackers(options: LogOptions) -> None:
    """Raise UserError for what would keep trackers from starting: a missing package or folder, a faulty TOML file."""
    if options.log_with in ("tensorboard", "all") and options.logging_dir is None:
        raise UserError(f"--log_with {options.log_with} needs a folder", fix="--logging_dir FOLDER")
    if _wants_board(options):
        _import("torch.utils.tensorboard.writer", "TensorBoard", "tensorboard")
    if _wants_wandb(options):
        _import("wandb", "wandb", "wandb")
    tracker_arguments(options)


def make_trackers(
    options: LogOptions, output: Path, name: str, start: int, facts: Mapping[str, str]
) -> Sequence[Tracker]:
    """run.jsonl in the output folder always; TensorBoard and wandb under --logging_dir; wandb without it in the output.

    `facts`: what --log_config writes. They must hold no secrets; absolute paths in them are cut down to names here.
    """
    check_trackers(options)
    public = {key: without_paths(value) for key, value in facts.items()} if options.log_config else {}
    arguments, folder = tracker_arguments(options), log_folder(options, options.logging_dir or output)
    trackers: list[Tracker] = [JsonLines(output / f"{name}.run.jsonl", start)]
    if _wants_board(options):
        board = TensorBoard(folder, start, arguments.get("tensorboard", NOTHING))
        if public:
            board.text("options", "\n".join(f"    {key} = {value}" for key, value in public.items()))
        trackers.append(board)
    if _wants_wandb(options):
        place = folder.parent if options.logging_dir else output
        try:
            trackers.append(Wandb(options, place, public, arguments.get("wandb", NOTHING)))
        except OSError as error:
            log.warning("wandb could not be started, training goes on without it: %s", error)
    return trackers


def tracker_arguments(options: LogOptions) -> Mapping[str, Mapping[str, Any]]:
    """The sections of --log_tracker_config: what is handed to wandb.init and to TensorBoard's SummaryWriter."""
    path = options.log_tracker_config
    if path is None:
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--log_tracker_config: cannot read {path} ({error.strerror})") from error
    except ValueError as error:  # neither TOML nor UTF-8
        raise UserError(f"--log_tracker_config: {path}: {error}") from error
    for key, value in table.items():
        if key not in SECTIONS or not isinstance(value, dict):
            raise UserError(f"--log_tracker_config: {path}: {key} is neither [wandb] nor [tensorboard]")
    return table


def log_folder(options: LogOptions, root: Path) -> Path:
    """This run's folder: --log_prefix and the time, and in it the tracker's name, as the field lays them out."""
    stamp = (options.log_prefix or "") + time.strftime("%Y%m%d%H%M%S")
    return root / stamp / (options.log_tracker_name or PROJECT)


def _wants_board(options: LogOptions) -> bool:
    return options.log_with in ("tensorboard", "all") or (options.log_with is None and options.logging_dir is not None)


def _wants_wandb(options: LogOptions) -> bool:
    return options.log_with in ("wandb", "all")


def _import(module: str, what: str, package: str) -> Any:
    """A module that is only there where the user installed it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} is not installed", fix=f"pip install {package}") from error


def _lines(path: Path) -> list[str]:
    """Whole lines of an earlier run's file; a torn last one is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()


def _step(line: str) -> float:
    """The step that a line is about; infinity where it is torn."""
    try:
        row: Any = json.loads(line)
        return row["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
