"""This process alone, or its place among those that a launcher started."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState

from sfumato.common.stop_signals import stop_blocked_calls
from sfumato.config.environment import read_launch
from sfumato.errors import UserError


def start_processes(timeout_minutes: int | None = None) -> PartialState:
    """Join the other processes; a launch in which they do not find each other is refused.

    timeout_minutes: how long each waits for the others; None for torch's own limit.
    """
    limits = {} if timeout_minutes is None else {"timeout": timedelta(minutes=timeout_minutes)}
    with stop_blocked_calls():  # others may never come
        processes = PartialState(cpu=not torch.cuda.is_available(), **limits)
    launched = read_launch().processes
    if launched != processes.num_processes:
        raise UserError(
            f"{launched} processes were launched, but they do not know of each other",
            code="processes-not-joined",
            fix="launch with torchrun --nproc_per_node N",
        )
    return processes


def device_of(processes: PartialState) -> torch.device:
    assert processes.device is not None
    return processes.device
