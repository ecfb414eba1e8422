"""Processes that wait for each other: without a limit of time, and never for one that has failed."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Any

import pytest
from torch.distributed import HashStore

from parallel.pairs import meet_both, run_both
from sfumato.errors import UserError
from sfumato.parallel.base import ProcessFailed
from sfumato.parallel.liveness import Lifeline, Watch, start_connection
from sfumato.parallel.meeting import Meetings


def test_values_come_by_rank_and_leave_nothing_behind() -> None:
    stores: list[Any] = []

    def meet(meetings: Meetings) -> list[list[Any]]:
        stores.append(meetings.store)
        return [meetings.exchange({"rank": meetings.rank, "number": number}) for number in range(50)]

    first, second = meet_both(meet)
    assert first == second
    assert first[49] == [{"rank": 0, "number": 49}, {"rank": 1, "number": 49}]
    assert stores[0].num_keys() == 2  # of the last meeting


def test_who_comes_late_is_waited_for() -> None:
    def meet(meetings: Meetings) -> list[Any]:
        if meetings.rank:
            time.sleep(0.5)
        return meetings.exchange(meetings.rank)

    assert meet_both(meet) == [[0, 1], [0, 1]]


def test_a_failure_ends_the_waiting_of_others() -> None:
    def fail(meetings: Meetings) -> Any:
        if meetings.rank:
            meetings.announce_failure()
            while meetings.has_audience():
                time.sleep(0.01)
            return "nobody waits any more"
        return meetings.exchange(None)

    waiting, failing = meet_both(fail)
    assert isinstance(waiting, ProcessFailed)
    assert waiting.code == "process-failed"
    assert "process 1" in str(waiting)
    assert failing == "nobody waits any more"


@pytest.mark.parametrize("silent", [0, 1])
def test_whoever_ends_in_silence_is_noticed(silent: int) -> None:
    def end(meetings: Meetings) -> Any:
        if meetings.rank == silent:
            meetings.close()
            return None
        return meetings.exchange(None)

    waiting = meet_both(end)[1 - silent]
    assert isinstance(waiting, UserError)
    assert waiting.code == "process-lost"
    assert f"process {silent}" in str(waiting)


def test_who_has_come_to_the_last_meeting_may_be_gone() -> None:
    """It is the process that may hold the store which stays for the other."""

    def leave(meetings: Meetings) -> str:
        meetings.leave()
        meetings.close()
        return "left"

    assert meet_both(leave) == ["left", "left"]


def test_a_store_that_is_gone_is_a_failure_of_another_process() -> None:
    class Gone(HashStore):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer")

    store = Gone()
    found = run_both(lambda rank: Meetings(store, rank=rank, processes=2, main_host="127.0.0.1"))
    assert [error.code for error in found] == ["process-ended", "process-ended"]


def test_a_killed_process_is_seen_to_be_dead_and_a_stopped_one_is_not() -> None:
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        lifeline = Lifeline("127.0.0.1", 2)
        host, port = lifeline.address
        os.write(sender, f"{host} {port}".encode())
        time.sleep(60)
        os._exit(0)
    try:
        host, port = os.read(receiver, 100).decode().split()
        watch = Watch([("", 0), (host, int(port))], own_rank=0)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)
        assert watch.list_ended() == []
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    deadline = time.monotonic() + 10
    while watch.list_ended() != [1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.list_ended() == [1]
    watch.close()


def test_where_no_connection_came_to_be_nobody_is_declared_dead() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        refused = server.getsockname()[:2]
    watch = Watch([("", 0), refused, ("", 0)], own_rank=0)
    for _ in range(5):
        assert watch.list_ended() == []
        time.sleep(0.02)
    assert not watch.connections
    unreachable = start_connection(("192.0.2.1", 9))  # an address that is nobody's
    unreachable.close()
