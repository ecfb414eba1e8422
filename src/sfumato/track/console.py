"""Messages: to the terminal in colour, plainly, or to a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.config import LogOptions
from sfumato.config.secrets import scrubbed
from sfumato.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

PLAIN = "%(asctime)s %(levelname)-7s %(message)s"


class LogFile(logging.FileHandler):
    """Messages in a file. Where it can no longer be written, that is said once on the screen, and training goes on."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's name
        if not self.told:
            sys.stderr.write(f"--console_log_file: {self.baseFilename} cannot be written any more\n")
            self.told = True


class Discreet(logging.Filter):
    """Takes secrets out of messages, whoever put them in."""

    def __init__(self, secrets: Collection[str]) -> None:
        super().__init__()
        self.secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = scrubbed(record.getMessage(), self.secrets), None
        return True


def set_up(options: LogOptions, *, main_process: bool = True, secrets: Collection[str] = ()) -> None:
    """Send what the program logs to stderr, or to --console_log_file; other processes only speak of errors.

    secrets: what is taken out of every message. Raises UserError when the file cannot be written.
    """
    handler = _to_file(options.console_log_file) if options.console_log_file else _to_terminal(options)
    handler.addFilter(Discreet(secrets))
    logger = logging.getLogger("sfumato")
    for old in logger.handlers:
        old.close()
    logger.handlers[:] = [handler]
    logger.propagate = False  # libraries hang handlers of their own on the root
    level = logging.getLevelNamesMapping()[options.console_log_level or "INFO"]
    logger.setLevel(level if main_process else max(level, logging.ERROR))


@cache
def terminal() -> Console:
    """The one console of messages and bars, so that a message appears above a moving bar."""
    from rich.console import Console

    return Console(stderr=True)


def _to_file(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = LogFile(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--console_log_file: cannot write {path} ({error.strerror})") from error
    handler.setFormatter(logging.Formatter(PLAIN))
    return handler


def _to_terminal(options: LogOptions) -> logging.Handler:
    if options.console_log_simple or not sys.stderr.isatty():  # a log file wants whole lines
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(PLAIN, datefmt="%H:%M:%S"))
        return handler
    from rich.logging import RichHandler

    return RichHandler(console=terminal(), show_path=False, log_time_format="%H:%M:%S", markup=False)
