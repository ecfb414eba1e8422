"""The progress of long tasks: a line from time to time, a bar on a terminal."""

from __future__ import annotations

from sfumato.track.progress_task import ProgressTask


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_from_time_to_time(messages):
    clock = Clock()
    with ProgressTask("latents", "images", clock=clock) as task:
        for done in range(1, 101):
            clock.now += 0.5
            task(done, 100)
    lines = [record.getMessage() for record in messages]
    assert lines[0] == "latents: 20 of 100, 2.0 images per second, 0:40 left"
    assert len(lines) == 5


def test_a_short_task_logs_nothing(messages):
    clock = Clock()
    with ProgressTask("latents", "images", clock=clock) as task:
        clock.now += 9
        task(1, 1)
    assert not messages


def test_other_processes_are_silent(messages):
    clock = Clock()
    with ProgressTask("latents", "images", visible=False, clock=clock) as task:
        clock.now += 60
        task(1, 2)
    assert not messages


def test_a_bar_on_a_terminal(new_screen):
    screen, clock = new_screen(), Clock()
    with ProgressTask("latents", "images", clock=clock) as task:
        for done in (8, 16):
            clock.now += 2
            task(done, 16)
    text = screen.getvalue()
    assert "latents" in text
    assert "16/16" in text
    assert "4.0 images per second" in text


def test_nothing_to_do_shows_no_bar(new_screen):
    screen = new_screen()
    with ProgressTask("latents", "images"):
        pass
    assert screen.getvalue() == ""
