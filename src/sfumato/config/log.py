"""Options of logs, trackers and messages."""

from __future__ import annotations

from typing import Literal

from pydantic import SecretStr

from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class LogOptions(Options):
    """Logs and messages"""

    strict: bool = option(False, "an option that has no effect in this run is an error")
    debug: bool = option(False, "show where an error came from")
    report: bool = option(True, "write a page about the run, OUTPUT_NAME.report.html, beside what it saves")
    logging_dir: FilePath | None = option(None, "folder of the training logs; each run gets a folder in it")
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None,
        "where curves are written; tensorboard if only --logging_dir is given",
    )
    log_prefix: str | None = option(None, "put before the date in the name of the run's log folder")
    log_tracker_name: str | None = option(None, "name of the tracker's project")
    log_config: bool = option(False, "write the options into the log, without secrets and paths")
    log_tracker_config: FilePath | None = option(
        None, "TOML file with arguments for the trackers, in the sections [wandb] and [tensorboard]", path="file"
    )
    wandb_run_name: str | None = option(None, "name of the run in wandb")
    wandb_api_key: SecretStr | None = option(None, "key for wandb; better given by WANDB_API_KEY or `wandb login`")
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = option(
        None, "least important messages shown; without it INFO"
    )
    console_log_file: FilePath | None = option(None, "file for the messages instead of the screen")
    console_log_simple: bool = option(False, "plain messages without colours and moving bars")
