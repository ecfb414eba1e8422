"""Trackers of a run's metrics: always a file of JSON lines, TensorBoard and wandb with --log_with."""

from __future__ import annotations

import importlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sfumato.common import files
from sfumato.common.json_toml import decode_json, decode_toml
from sfumato.common.text import EMPTY, strip_paths
from sfumato.common.text_files import read_text_file
from sfumato.config import LogOptions
from sfumato.errors import UserError

log = logging.getLogger(__name__)
Value = float | Sequence[float]  # lists are for the JSON lines alone
SECTIONS = ("wandb", "tensorboard")  # of --log_tracker_config
PROJECT = "network_train"  # sd-scripts' default of --log_tracker_name
WANDB_PRIVACY = {  # settings that keep command line, paths, user, host, console output and source from wandb
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "console": "off",
}


class Tracker(Protocol):
    """A destination of a step's metrics, by sd-scripts' names of series: loss/average, lr/unet, ..."""

    def log(self, step: int, values: Mapping[str, Value]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One line per step, written immediately; a resumed run removes the lines of steps that it repeats.

    nan and inf become null. What a full disk does not take waits for the next step; a file that was deleted is written
    again as a whole.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self.unwritten = bytearray()
        lines = [line for line in _read_lines(path) if _parse_step(line) <= start] if start else []
        files.write_text(path, "".join(line + "\n" for line in lines))
        self.file = path.open("a+b", buffering=0)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """OSError where the line has to wait."""
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self.unwritten += json.dumps({"step": step, **row}).encode() + b"\n"
        self._write()

    def close(self) -> None:
        try:
            self._write()
        finally:
            self.file.close()

    def _write(self) -> None:
        if self.unwritten and not self.path.exists():
            self._restore()
        while self.unwritten:
            written = self.file.write(self.unwritten)  # a part of it where the disk is full, then OSError
            del self.unwritten[:written]

    def _restore(self) -> None:
        """The deleted file's content can be read as long as it is open."""
        self.file.seek(0)
        files.write_bytes(self.path, self.file.read())
        self.file.close()
        self.file = self.path.open("a+b", buffering=0)


class TensorBoard:
    """Event files for TensorBoard; a resumed run hides the events of the steps that it repeats."""

    def __init__(self, folder: Path, start: int, arguments: Mapping[str, Any] = EMPTY) -> None:
        writer = _import_tracker("torch.utils.tensorboard.writer", "TensorBoard", "tensorboard").SummaryWriter
        settings = {"purge_step": start + 1 if start else None, "flush_secs": 30, **arguments}
        try:
            self.writer = writer(str(folder), **settings)
        except TypeError as error:
            raise UserError(
                f"--log_tracker_config: [tensorboard] {error}", code="tensorboard-arguments-refused"
            ) from error
        except OSError as error:
            raise UserError(
                f"--logging_dir: cannot write to {folder} ({error.strerror})", code="logging-dir-not-writable"
            ) from error

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def text(self, name: str, content: str) -> None:
        self.writer.add_text(name, content)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run at wandb, which gets the metrics and `facts` alone: no command line, code, host or console output.

    Raises OSError where it cannot start, so that training goes on without it.
    """

    def __init__(
        self, options: LogOptions, folder: Path, facts: Mapping[str, str], arguments: Mapping[str, Any] = EMPTY
    ) -> None:
        wandb = _import_tracker("wandb", "wandb", "wandb")
        failures = (wandb.Error, RuntimeError, ValueError, TimeoutError)  # not TypeError: a wrong name in the file
        settings = {**WANDB_PRIVACY, **arguments.get("settings", {})}
        if options.wandb_api_key:
            settings["api_key"] = options.wandb_api_key.get_secret_value()
        init = {"project": options.log_tracker_name or PROJECT, "dir": str(folder), "config": dict(facts), **arguments}
        if options.wandb_run_name:
            init["name"] = options.wandb_run_name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(**{**init, "settings": wandb.Settings(**settings)})
        except TypeError as error:
            raise UserError(f"--log_tracker_config: [wandb] {error}", code="wandb-arguments-refused") from error
        except failures as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        self.run.log({name: value for name, value in values.items() if isinstance(value, int | float)}, step=step)

    def close(self) -> None:
        self.run.finish()


def check_trackers(options: LogOptions) -> None:
    """Raise UserError for what would keep trackers from starting: a missing package or option, an invalid TOML file."""
    if options.log_with in ("tensorboard", "all") and options.logging_dir is None:
        raise UserError(
            f"--log_with {options.log_with} needs a folder", code="tracker-folder-missing", fix="--logging_dir FOLDER"
        )
    if _uses_tensorboard(options):
        _import_tracker("torch.utils.tensorboard.writer", "TensorBoard", "tensorboard")
    if _uses_wandb(options):
        _import_tracker("wandb", "wandb", "wandb")
    read_tracker_config(options)


def make_trackers(
    options: LogOptions, output: Path, name: str, start: int, facts: Mapping[str, str]
) -> Sequence[Tracker]:
    """Always NAME.run.jsonl in the output folder; TensorBoard and wandb in --logging_dir, which for wandb is optional.

    facts: what --log_config writes, without secrets; absolute paths in them are cut to names here.
    """
    check_trackers(options)
    public = {key: strip_paths(value) for key, value in facts.items()} if options.log_config else {}
    arguments, folder = read_tracker_config(options), choose_log_folder(options, options.logging_dir or output)
    trackers: list[Tracker] = [JsonLines(output / f"{name}.run.jsonl", start)]
    if _uses_tensorboard(options):
        board = TensorBoard(folder, start, arguments.get("tensorboard", EMPTY))
        if public:
            board.text("options", "\n".join(f"    {key} = {value}" for key, value in public.items()))
        trackers.append(board)
    if _uses_wandb(options):
        wandb_folder = folder.parent if options.logging_dir else output
        try:
            trackers.append(Wandb(options, wandb_folder, public, arguments.get("wandb", EMPTY)))
        except OSError as error:
            log.warning("cannot start wandb: %s; training goes on", error)
    return trackers


def read_tracker_config(options: LogOptions) -> Mapping[str, Mapping[str, Any]]:
    """The sections of --log_tracker_config: arguments of wandb.init and of TensorBoard's SummaryWriter."""
    path = options.log_tracker_config
    if path is None:
        return {}
    try:
        table = decode_toml(read_text_file(path))
    except OSError as error:
        raise UserError(
            f"--log_tracker_config: cannot read {path} ({error.strerror})", code="tracker-config-unreadable"
        ) from error
    except ValueError as error:
        raise UserError(f"--log_tracker_config: {path}: {error}", code="tracker-config-invalid") from error
    for key, value in table.items():
        if key not in SECTIONS or not isinstance(value, dict):
            raise UserError(
                f"--log_tracker_config: {path}: {key} is neither [wandb] nor [tensorboard]",
                code="tracker-config-section-unknown",
            )
    return table


def choose_log_folder(options: LogOptions, root: Path) -> Path:
    """The run's folder as in sd-scripts: --log_prefix with the time, and in it --log_tracker_name."""
    stamp = (options.log_prefix or "") + time.strftime("%Y%m%d%H%M%S")
    return root / stamp / (options.log_tracker_name or PROJECT)


def _uses_tensorboard(options: LogOptions) -> bool:
    return options.log_with in ("tensorboard", "all") or (options.log_with is None and options.logging_dir is not None)


def _uses_wandb(options: LogOptions) -> bool:
    return options.log_with in ("wandb", "all")


def _import_tracker(module: str, what: str, package: str) -> Any:
    """A module of an optional package; UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} is not installed", code="tracker-package-missing", fix=f"pip install {package}"
        ) from error


def _read_lines(path: Path) -> list[str]:
    """The complete lines of an earlier run's file, without a torn last one."""
    if not path.is_file():
        return []
    text = files.read_file(path).decode(errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()


def _parse_step(line: str) -> float:
    """The step of a line; infinity where it is torn."""
    try:
        row: Any = decode_json(line)
        return float(row["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf
