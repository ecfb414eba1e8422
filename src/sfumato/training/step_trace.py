"""--profile: a trace of some steps, what the host and the device did when, and on a GPU a snapshot of its memory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sfumato.common.files import write_atomically
from sfumato.plan import RunPlan
from sfumato.track.guard import Guard

log = logging.getLogger(__name__)
WARM_UP = 3  # steps that are not traced where the run is long enough: the first ones choose kernels and allocate
MOST_EVENTS = 100_000  # allocations that a snapshot remembers
WORK = "tracing steps"


class StepTrace:
    """Traces `count` steps, 0 for none, into NAME.trace.json and NAME.memory.pickle; whatever fails is a warning."""

    def __init__(self, folder: Path, name: str, device: torch.device, *, count: int, steps: int) -> None:
        """steps: that the run has left."""
        self.count = min(count, steps)
        self.first = min(WARM_UP, steps - self.count)  # counted from 0 in this session
        self.path, self.memory_path = folder / f"{name}.trace.json", folder / f"{name}.memory.pickle"
        self.on_cuda = device.type == "cuda"
        self.steps_done = 0
        self.guard = Guard()
        self.profiler: profile | None = None

    def before_step(self) -> None:
        if self.count and self.steps_done == self.first:
            with self.guard.survive(WORK):
                self._start()

    def after_step(self) -> None:
        self.steps_done += 1
        if self.steps_done == self.first + self.count:
            self.finish()

    def finish(self) -> None:
        """Write what was traced; nothing where no trace is going on."""
        profiler, self.profiler = self.profiler, None
        if profiler is None:
            return
        with self.guard.survive(WORK):
            profiler.stop()
            with write_atomically(self.path) as temporary:
                profiler.export_chrome_trace(str(temporary))
            log.info(
                "%d steps traced: %s; open it with Perfetto or chrome://tracing",
                self.steps_done - self.first,
                self.path,
            )
            if self.on_cuda:
                self._write_snapshot()

    def _start(self) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
        profiler = profile(activities=kinds, record_shapes=True)
        profiler.start()
        self.profiler = profiler
        if self.on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)

    def _write_snapshot(self) -> None:
        with write_atomically(self.memory_path) as temporary:
            torch.cuda.memory._dump_snapshot(str(temporary))
        torch.cuda.memory._record_memory_history(enabled=None)
        log.info("memory of these steps: %s; open it with torch's memory viewer", self.memory_path)


def make_step_trace(plan: RunPlan, device: torch.device, *, first_step: int, is_main: bool) -> StepTrace:
    """Of the main process."""
    count = plan.config.log.profile or 0
    steps = plan.total_steps - first_step
    return StepTrace(plan.output_dir, plan.config.save.output_name, device, count=count if is_main else 0, steps=steps)
