"""The progress of long jobs: lines now and then, a bar on a terminal."""

from __future__ import annotations

from sfumato.track.jobs import Job


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_now_and_then_with_speed_and_time_left(messages):
    clock = Clock()
    with Job("latents", "images", clock=clock) as job:
        for done in range(1, 101):
            clock.now += 0.5
            job(done, 100)
    lines = [record.getMessage() for record in messages]
    assert lines[0] == "latents: 20 of 100, 2.0 images a second, 0:40 left"
    assert len(lines) == 5


def test_a_short_job_says_nothing(messages):
    clock = Clock()
    with Job("latents", "images", clock=clock) as job:
        clock.now += 9
        job(1, 1)
    assert not messages


def test_other_processes_are_silent(messages):
    clock = Clock()
    with Job("latents", "images", visible=False, clock=clock) as job:
        clock.now += 60
        job(1, 2)
    assert not messages


def test_a_bar_on_a_terminal(new_screen):
    screen, clock = new_screen(), Clock()
    with Job("latents", "images", clock=clock) as job:
        for done in (8, 16):
            clock.now += 2
            job(done, 16)
    shown = screen.getvalue()
    assert "latents" in shown
    assert "16/16" in shown
    assert "4.0 images a second" in shown


def test_nothing_to_do_shows_no_bar(new_screen):
    screen = new_screen()
    with Job("latents", "images"):
        pass
    assert screen.getvalue() == ""
