"""Messages: to the terminal in colour, plainly, or to a file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from sfumato.config import LogOptions

PLAIN = "%(asctime)s %(levelname)-7s %(message)s"


def set_up(options: LogOptions, *, main_process: bool = True) -> None:
    """Send what the program logs to stderr, or to --console_log_file; other processes only speak of errors."""
    handler = _to_file(options.console_log_file) if options.console_log_file else _to_terminal(options)
    logger = logging.getLogger("sfumato")
    logger.handlers[:] = [handler]
    logger.propagate = False
    level = logging.getLevelNamesMapping()[options.console_log_level or "INFO"]
    logger.setLevel(level if main_process else max(level, logging.ERROR))


def _to_file(path: Path) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(PLAIN))
    return handler


def _to_terminal(options: LogOptions) -> logging.Handler:
    if options.console_log_simple or not sys.stderr.isatty():  # a log file wants whole lines
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(PLAIN, datefmt="%H:%M:%S"))
        return handler
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S", markup=False)
