"""Joining the other processes of a launch: torch's process group, and the store of meetings."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sfumato.config.environment import Launch
from sfumato.errors import UserError
from sfumato.parallel.meeting import Meetings


def join_processes(launch: Launch, device: torch.device, timeout: timedelta | None) -> Meetings:
    """timeout: for the others to come, and within a sum; None for torch's own limits."""
    try:
        store, rank, processes = next(rendezvous("env://", timeout=timeout or distributed.default_pg_timeout))
    except (ValueError, RuntimeError) as error:  # torch's own errors of stores are of the second class
        raise UserError(
            f"the {launch.processes} processes of this launch did not find each other: {error}",
            code="processes-not-joined",
            fix="launch with torchrun --nproc_per_node N, and on several machines give all the same address and port",
        ) from error
    backend = "nccl" if device.type == "cuda" and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(
        backend, store=PrefixStore("sums", store), rank=rank, world_size=processes, timeout=timeout
    )
    main_host = os.environ.get("MASTER_ADDR", "localhost")
    return Meetings(PrefixStore("meetings", store), rank=rank, processes=processes, main_host=main_host)
