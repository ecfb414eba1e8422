"""What the stages of a real run take of its device: seconds, the peak of its memory, and a shortage of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sfumato.common.text import join_lines
from sfumato.errors import UserError
from sfumato.memory.device_memory import forget_peak_memory, read_peak_memory
from sfumato.tools.rehearsal_stages import Stage, StageRecorder


@dataclass
class DeviceMeter:
    """Measures time, and on a GPU the peak of torch's allocator."""

    device: torch.device
    started: float = field(default_factory=time.perf_counter)

    @property
    def measures_memory(self) -> bool:
        return self.device.type == "cuda"

    def name_networks(self, networks: Mapping[str, nn.Module]) -> None:
        return

    def start(self) -> None:
        self._wait()
        forget_peak_memory(self.device)
        self.started = time.perf_counter()

    def finish(self, name: str, resident: Mapping[str, Sequence[Tensor]]) -> Stage:
        self._wait()
        seconds = time.perf_counter() - self.started
        peak = read_peak_memory(self.device) or 0
        return Stage(name=name, peak=peak, resident={}, largest=(), waits=(), seconds=seconds)

    def _wait(self) -> None:
        if self.measures_memory:
            torch.cuda.synchronize(self.device)


@contextmanager
def report_exhaustion(recorder: StageRecorder) -> Iterator[None]:
    """A context in which too little memory on the GPU is the user's to fix."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        done = recorder.stages[-1].name if recorder.stages else "the start"
        raise UserError(
            f"the GPU has too little memory for what follows {done}: {join_lines(error)}",
            code="dry-run-out-of-memory",
            fix="`sfumato plan --fit` finds options with which the run fits",
        ) from error
