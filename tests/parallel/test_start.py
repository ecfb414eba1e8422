"""Which strategy a launch gets, and launches that cannot work."""

from __future__ import annotations

import ast
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sfumato.parallel
from house_rules import talks_to_processes
from sfumato.config import ProcessOptions
from sfumato.errors import UserError
from sfumato.parallel import join
from sfumato.parallel.all_reduce import AllReduce
from sfumato.parallel.single import Single
from sfumato.parallel.start import choose_device, start_parallel


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two processes without GPUs, of which this is the second."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_nothing_of_torch_distributed_is_needed() -> None:
    """Some builds of torch have none of it."""
    assert isinstance(start_parallel(), Single)
    folder = Path(sfumato.parallel.__file__).parent
    for name in ("base", "single", "start"):
        assert not list(talks_to_processes(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))))


@pytest.mark.parametrize(("minutes", "limit"), [(None, None), (7, timedelta(minutes=7))])
def test_how_long_processes_wait_for_each_other(
    minutes: int | None, limit: timedelta | None, launch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    launch.setattr(join, "join_processes", lambda *values: given.append(values) or SimpleNamespace(rank=1, processes=2))
    assert isinstance(start_parallel(ProcessOptions(ddp_timeout=minutes)), AllReduce)
    assert given == [((1, 2), torch.device("cpu"), limit)]


def test_a_launch_without_an_address_is_refused(launch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        start_parallel()
    assert caught.value.code == "processes-not-joined"


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [choose_device(rank) for rank in range(2)] == [torch.device("cuda", rank) for rank in range(2)]
    assert chosen == [0, 1]
    with pytest.raises(UserError) as caught:
        choose_device(2)
    assert caught.value.code == "processes-exceed-gpus"


@pytest.mark.parametrize(("environment", "threads"), [({"LOCAL_WORLD_SIZE": "2"}, 4), ({"OMP_NUM_THREADS": "8"}, 8)])
def test_processes_of_one_machine_share_its_cores(
    environment: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the launcher has set the number of threads."""
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    numbers = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    choose_device(0)
    assert numbers[-1] == threads
