"""Messages reach the place that was asked for, whole, and only those that are important enough."""

import logging
import re
import resource

import pytest

from sfumato.config import LogOptions
from sfumato.errors import UserError
from sfumato.track.console import set_up

LONG = "word " * 60 + "[red]not markup[/red] {braces} 100%"


def test_lines_stay_whole_where_there_is_no_terminal(capsys):
    set_up(LogOptions())
    logging.getLogger("sfumato.some.module").info("%s", LONG)
    logging.getLogger("sfumato.some.module").debug("hidden")
    logging.getLogger("elsewhere").info("hidden")
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(rf"\d\d:\d\d:\d\d INFO    {re.escape(LONG)}\n", told.err)


def test_a_terminal_gets_colour_unless_it_should_be_simple(new_screen):
    for simple in (False, True):
        screen = new_screen()
        set_up(LogOptions(console_log_simple=simple))
        logging.getLogger("sfumato").warning("look [here]")
        assert ("\x1b[" in screen.getvalue()) != simple
        assert "here" in screen.getvalue()


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
def test_levels(capsys, level):
    set_up(LogOptions(console_log_level=level))
    names = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    for name in names:
        logging.getLogger("sfumato").log(logging.getLevelNamesMapping()[name], "message")
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == names[names.index(level) :]


def test_a_file_instead_of_the_screen(tmp_path, capsys):
    path = tmp_path / "logs" / "run.log"
    for word in ("größer", "again"):  # a second run goes on in the same file
        set_up(LogOptions(console_log_file=path))
        logging.getLogger("sfumato").info(word)
    assert capsys.readouterr().err == ""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split()[-2:] for line in lines] == [["INFO", "größer"], ["INFO", "again"]]


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--console_log_file: cannot write"):
        set_up(LogOptions(console_log_file=tmp_path / "file" / "run.log"))


def test_other_processes_only_speak_of_errors(capsys):
    set_up(LogOptions(console_log_level="DEBUG"), main_process=False)
    logging.getLogger("sfumato").warning("hidden")
    logging.getLogger("sfumato").error("shown")
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == ["shown"]


def test_secrets_are_taken_out_of_every_message(capsys):
    set_up(LogOptions(), secrets={"canary-3f9a", "canary-3f9a-longer"})
    logging.getLogger("sfumato.x").warning("%s and canary-3f9a-longer, %d%%", "canary-3f9a", 5)
    told = capsys.readouterr().err
    assert told.endswith("(secret) and (secret), 5%\n")


def test_a_full_disk_is_said_once_on_the_screen(tmp_path, capsys):
    set_up(LogOptions(console_log_file=tmp_path / "run.log"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        for _ in range(3):
            logging.getLogger("sfumato").warning("no room for this")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr().err.splitlines()
    assert told == [f"--console_log_file: {tmp_path / 'run.log'} cannot be written any more"]
