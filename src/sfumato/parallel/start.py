"""Which strategy a run has: this process alone, or those that accelerate's launcher or torchrun started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from sfumato.common.stop_signals import stop_blocked_calls
from sfumato.config.environment import read_launch
from sfumato.errors import UserError
from sfumato.parallel.base import ParallelStrategy
from sfumato.parallel.single import Single


def start_parallel(timeout_minutes: int | None = None) -> ParallelStrategy:
    """Join the other processes, if there are any; a launch in which they do not find each other is refused.

    timeout_minutes: how long each waits for the others to start and within a sum; None for torch's own limit.
    """
    launch = read_launch()
    if launch.processes == 1:
        return Single(choose_device())
    from sfumato.parallel.join import join_processes  # not every build of torch has what several processes need

    device = choose_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = None if timeout_minutes is None else timedelta(minutes=timeout_minutes)
    with stop_blocked_calls():  # others may never come
        return join_processes(launch, device, timeout)


def choose_device(local_rank: int | None = None) -> torch.device:
    """The GPU of this process, or the CPU. local_rank: the process's number on its machine; None where it is alone."""
    if not torch.cuda.is_available():
        if local_rank is not None and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        return torch.device("cpu")
    if local_rank is None:
        return torch.device("cuda")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this machine has {torch.cuda.device_count()} GPUs, and more processes were launched on it",
            code="processes-exceed-gpus",
            fix=f"--nproc_per_node {torch.cuda.device_count()}, and for accelerate --num_processes",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
