"""Progress: right numbers, few lines, and a bar only where it can move."""

import logging

import pytest

from sfumato.config import LogOptions
from sfumato.track.console import configure_logging
from sfumato.track.progress import Progress, Speed, format_duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def lines(messages):
    """Call it for the lines so far."""
    return lambda: [record.getMessage() for record in messages]


def train(total, seconds, start=0, pause_at=None):
    clock = Clock()
    with Progress(total, start, plain=False, clock=clock) as progress:
        for step in range(start + 1, total + 1):
            taken = seconds + (1000 if step == pause_at else 0)
            clock.now += taken
            progress.advance(step, 0.125, 1e-4, Speed(seconds=taken, images=3))
    return progress


@pytest.mark.parametrize(
    ("total", "seconds", "expected"),
    [
        (1000, 0.001, 1),  # over in a second: only the last line
        (1000, 0.5, 50),  # 500 seconds, one line each 10
        (100, 0.5, 10),  # 50 seconds: one line each tenth
        (10, 60.0, 5),  # slow steps: never one line for each
        (2, 60.0, 1),
        (1, 60.0, 1),
    ],
)
def test_lines_are_few(lines, total, seconds, expected):
    train(total, seconds)
    assert len(lines()) == pytest.approx(expected, abs=1 if expected > 10 else 0)
    assert lines()[-1].startswith(f"step {total} of {total} ")


def test_the_text_of_a_line(lines):
    train(100, 2.0)
    assert lines()[0] == "step 5 of 100  loss 0.1250  lr 1.00e-04  2.00 s/it  1.5 images/s  3:10 left"
    assert lines()[-1] == "step 100 of 100  loss 0.1250  lr 1.00e-04  2.00 s/it  1.5 images/s  0:00 left"


def test_a_resumed_run_counts_its_own_time(lines):
    train(100, 2.0, start=90)
    assert lines()[0] == "step 95 of 100  loss 0.1250  lr 1.00e-04  2.00 s/it  1.5 images/s  0:10 left"


def test_a_pause_does_not_change_the_speed(lines):
    progress = train(40, 2.0, pause_at=20)
    assert progress.speed.seconds == 2.0


def test_memory_is_shown_where_it_is_counted(lines):
    with Progress(2, 0, plain=False) as progress:
        progress.advance(1, 0.1, 1e-4, Speed(seconds=2.0, images=1, peak_memory=7_100_000_000))
        progress.advance(2, 0.1, 1e-4, Speed(seconds=2.0, images=1, peak_memory=6_000_000_000))
    assert lines()[-1] == "step 2 of 2  loss 0.1000  lr 1.00e-04  2.00 s/it  0.5 images/s  peak 7.1 GB  0:00 left"


def test_an_invisible_one_is_silent(lines, capsys):
    progress = Progress(2, 0, plain=False, visible=False)
    progress.advance(2, 0.1, 0.1, Speed())
    assert lines() == []
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_with_messages_above(lines, new_screen):
    screen = new_screen()
    configure_logging(LogOptions())
    with Progress(4, 0, plain=False) as progress:
        progress.advance(1, 0.125, 1e-4, Speed())
        logging.getLogger("sfumato").warning("a message")
        progress.advance(4, 0.0625, 1e-4, Speed())
    text = screen.getvalue()
    assert "a message" in text
    assert "4/4" in text
    assert "loss 0.0625" in text
    assert lines() == []
    with Progress(4, 0, plain=True) as progress:  # --console_log_simple
        progress.advance(4, 0.5, 1e-4, Speed())
    assert len(lines()) == 1


def test_durations():
    assert [format_duration(s) for s in (0, 59.6, 61, 3599, 3600, 90061)] == [
        "0:00",
        "1:00",
        "1:01",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]
