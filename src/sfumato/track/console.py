"""Logging to the terminal, in color or plain, or to a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.config import LogOptions
from sfumato.config.secrets import redact
from sfumato.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


class LogFile(logging.FileHandler):
    """A log file; a failed write is reported once on stderr, and training goes on."""

    warned = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's name
        if not self.warned:
            sys.stderr.write(f"--console_log_file: {self.baseFilename} cannot be written; further messages are lost\n")
            self.warned = True


class SecretFilter(logging.Filter):
    """Removes secrets from messages, and tracebacks where they are not wanted."""

    def __init__(self, secrets: Collection[str], *, tracebacks: bool) -> None:
        super().__init__()
        self.secrets, self.tracebacks = secrets, tracebacks

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage(), self.secrets), None
        if record.exc_info:
            text = logging.Formatter().formatException(record.exc_info)
            record.exc_text, record.exc_info = redact(text, self.secrets) if self.tracebacks else None, None
        return True


def configure_logging(options: LogOptions, *, main_process: bool = True, secrets: Collection[str] = ()) -> None:
    """Log to stderr or --console_log_file; processes other than the main one log errors only.

    secrets: removed from every message. UserError when the file cannot be written.
    """
    handler = (
        _make_file_handler(options.console_log_file) if options.console_log_file else _make_terminal_handler(options)
    )
    tracebacks = options.console_log_file is not None or options.debug
    handler.addFilter(SecretFilter(secrets, tracebacks=tracebacks))
    logger = logging.getLogger("sfumato")
    for old in logger.handlers:
        old.close()
    logger.handlers[:] = [handler]
    logger.propagate = False  # libraries add handlers to the root logger
    level = logging.getLevelNamesMapping()[options.console_log_level or "INFO"]
    logger.setLevel(level if main_process else max(level, logging.ERROR))


@cache
def terminal() -> Console:
    """The console that messages and progress bars share, so that a message appears above a moving bar."""
    from rich.console import Console

    return Console(stderr=True)


def _make_file_handler(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(
            f"--console_log_file: cannot write {path} ({error.strerror})", code="console-log-file-not-writable"
        ) from error
    handler.setFormatter(logging.Formatter(PLAIN_FORMAT))
    return handler


def _make_terminal_handler(options: LogOptions) -> logging.Handler:
    if options.console_log_simple or not sys.stderr.isatty():  # plain lines when redirected to a file
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(PLAIN_FORMAT, datefmt="%H:%M:%S"))
        return handler
    from rich.logging import RichHandler

    return RichHandler(console=terminal(), show_path=False, log_time_format="%H:%M:%S", markup=False)
