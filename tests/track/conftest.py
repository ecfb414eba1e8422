"""A terminal to write on, and loggers that are restored after each test."""

import io
import logging

import pytest

from sfumato.track.console import terminal


class Screen(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def new_screen(monkeypatch):
    """Call it for a fresh terminal in the place of standard error."""

    def make():
        screen = Screen()
        monkeypatch.setattr("sys.stderr", screen)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "120")
        terminal.cache_clear()
        return screen

    yield make
    terminal.cache_clear()


@pytest.fixture(autouse=True)
def loggers_as_before():
    logger = logging.getLogger("sfumato")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def messages():
    """The records that the modules of track log."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("sfumato.track")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def warnings(messages):
    """Call it for the warnings so far."""
    return lambda: [record.getMessage() for record in messages if record.levelno >= logging.WARNING]
