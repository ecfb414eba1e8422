"""Signals that ask a process to stop: how often they count, and what they end."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from sfumato.common.stop_signals import LAST_STOP, STOP_SIGNALS, handle_stop_signals, stop_blocked_calls

BLOCKED = """
import ctypes
from sfumato.common.stop_signals import handle_stop_signals, stop_blocked_calls
mutex = ctypes.create_string_buffer(256)  # zeros are an unlocked one
lock = ctypes.CDLL(None).pthread_mutex_lock  # waits in C, whatever signals come
with handle_stop_signals(lambda: None), stop_blocked_calls():
    lock(mutex)
    print("ready", flush=True)
    lock(mutex)
"""
ENDING = """
import atexit, time
from sfumato.common.stop_signals import exit_process

@atexit.register
def end_slowly():
    print("ready", flush=True)
    for _ in range(300):
        time.sleep(0.1)

exit_process(7)
"""


@pytest.fixture(autouse=True)
def no_earlier_stop() -> Iterator[None]:
    LAST_STOP.time = -math.inf
    yield
    LAST_STOP.time = -math.inf


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_within_a_second_are_one(number: int) -> None:
    heard: list[int] = []
    before = signal.getsignal(number)
    with handle_stop_signals(lambda: heard.append(1)):
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert len(heard) == 1
        LAST_STOP.time -= 2.0
        os.kill(os.getpid(), number)
        assert len(heard) == 2
    assert signal.getsignal(number) == before


def test_a_handler_that_follows_another_knows_what_that_has_heard() -> None:
    heard: list[str] = []
    with handle_stop_signals(lambda: heard.append("outer")):
        with handle_stop_signals(lambda: heard.append("inner")):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == ["inner"]


def test_threads_get_no_signals() -> None:
    def use() -> None:
        with handle_stop_signals(pytest.fail), stop_blocked_calls():
            pass

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


def run(program: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="waits with a function of glibc")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_call_that_never_returns_can_be_stopped(number: int) -> None:
    process = run(BLOCKED)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.splitlines() == ["error: interrupted"]


def test_a_signal_at_the_very_end_does_not_change_the_exit_code() -> None:
    process = run(ENDING)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 7
