"""Options of logs, trackers and messages."""

from __future__ import annotations

from typing import Literal

from pydantic import SecretStr

from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class LogOptions(Options):
    """Logs and messages"""

    strict: bool = option(False, "an option that has no effect in this run is an error")
    debug: bool = option(False, "show the traceback of an error")
    profile: int | None = option(
        None,
        "trace this many steps, and a GPU's memory, into OUTPUT_NAME.trace.json and OUTPUT_NAME.memory.pickle",
        ge=1,
    )
    report: bool = option(True, "write a report page of the run, OUTPUT_NAME.report.html, to the output folder")
    logging_dir: FilePath | None = option(None, "folder of the training logs; each run gets a subfolder")
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None,
        "trackers; default: tensorboard if --logging_dir is given",
    )
    log_prefix: str | None = option(None, "prefix of the dated name of the run's log folder")
    log_tracker_name: str | None = option(None, "project name of the tracker")
    log_config: bool = option(False, "log the options, without secrets and paths")
    log_tracker_config: FilePath | None = option(
        None, "TOML file with arguments of the trackers, in the sections [wandb] and [tensorboard]", path="file"
    )
    wandb_run_name: str | None = option(None, "wandb run name")
    wandb_api_key: SecretStr | None = option(None, "wandb API key; prefer WANDB_API_KEY or `wandb login`")
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = option(
        None, "lowest level of messages on the console; default: INFO"
    )
    console_log_file: FilePath | None = option(None, "file for the messages instead of the console")
    console_log_simple: bool = option(False, "plain messages without colors and progress bars")
