"""Logging to the terminal or a file: levels, secrets, full disks."""

import logging
import re
import resource

import pytest

from sfumato.config import LogOptions
from sfumato.errors import UserError
from sfumato.track.console import configure_logging

LONG = "word " * 60 + "[red]not markup[/red] {braces} 100%"


def test_lines_are_not_wrapped_without_a_terminal(capsys):
    configure_logging(LogOptions())
    logging.getLogger("sfumato.some.module").info("%s", LONG)
    logging.getLogger("sfumato.some.module").debug("hidden")
    logging.getLogger("elsewhere").info("hidden")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"\d\d:\d\d:\d\d INFO    {re.escape(LONG)}\n", captured.err)


def test_a_terminal_gets_color_by_default(new_screen):
    for simple in (False, True):
        screen = new_screen()
        configure_logging(LogOptions(console_log_simple=simple))
        logging.getLogger("sfumato").warning("look [here]")
        assert ("\x1b[" in screen.getvalue()) != simple
        assert "here" in screen.getvalue()


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
def test_levels(capsys, level):
    configure_logging(LogOptions(console_log_level=level))
    names = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    for name in names:
        logging.getLogger("sfumato").log(logging.getLevelNamesMapping()[name], "message")
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == names[names.index(level) :]


def test_a_file_instead_of_the_screen(tmp_path, capsys):
    path = tmp_path / "logs" / "run.log"
    for word in ("größer", "again", "\udcff"):  # a second run appends to it
        configure_logging(LogOptions(console_log_file=path))
        logging.getLogger("sfumato").info(word)
    assert capsys.readouterr().err == ""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split()[-2:] for line in lines] == [["INFO", "größer"], ["INFO", "again"], ["INFO", "\\udcff"]]


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--console_log_file.*run\.log") as error:
        configure_logging(LogOptions(console_log_file=tmp_path / "file" / "run.log"))
    assert error.value.code == "console-log-file-not-writable"


def test_other_processes_only_log_errors(capsys):
    configure_logging(LogOptions(console_log_level="DEBUG"), main_process=False)
    logging.getLogger("sfumato").warning("hidden")
    logging.getLogger("sfumato").error("shown")
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == ["shown"]


def test_secrets_are_removed_from_every_message(capsys):
    configure_logging(LogOptions(), secrets={"canary-3f9a", "canary-3f9a-longer"})
    logging.getLogger("sfumato.x").warning("%s and canary-3f9a-longer, %d%%", "canary-3f9a", 5)
    assert capsys.readouterr().err.endswith("(secret) and (secret), 5%\n")


def test_a_full_disk_is_reported_once_on_stderr(tmp_path, capsys):
    configure_logging(LogOptions(console_log_file=tmp_path / "run.log"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        for _ in range(3):
            logging.getLogger("sfumato").warning("no room for this")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--console_log_file: {tmp_path / 'run.log'} ")
