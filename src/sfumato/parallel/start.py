"""Which strategy a run has: this process alone, or those that accelerate's launcher or torchrun started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from sfumato.common.stop_signals import stop_blocked_calls
from sfumato.config import ProcessOptions
from sfumato.config.environment import read_launch
from sfumato.errors import UserError
from sfumato.parallel.base import ParallelStrategy
from sfumato.parallel.single import Single

ALL_HAVE_ALL = ProcessOptions()
SENT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def start_parallel(options: ProcessOptions = ALL_HAVE_ALL, *, mixed_precision: str = "no") -> ParallelStrategy:
    """Join the other processes, if there are any; a launch in which they do not find each other is refused.

    mixed_precision: in which weights that are shared out are sent and computed with.
    """
    launch = read_launch()
    if launch.processes == 1:
        return Single(choose_device())
    from sfumato.parallel.join import join_processes  # not every build of torch has what several processes need

    device = choose_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = None if options.ddp_timeout is None else timedelta(minutes=options.ddp_timeout)
    with stop_blocked_calls():  # others may never come
        meetings = join_processes(launch, device, timeout)
    if options.deepspeed:
        from sfumato.parallel.zero import Zero

        return Zero(meetings, device, options, computed=SENT_DTYPES.get(mixed_precision))
    if not options.fsdp:
        from sfumato.parallel.all_reduce import AllReduce

        return AllReduce(meetings, device)
    from sfumato.parallel.fsdp import Fsdp  # which takes two seconds

    return Fsdp(meetings, device, computed=SENT_DTYPES.get(mixed_precision), offload=options.fsdp_offload_params)


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
