"""What becomes of each step, read one step late from copies, so that the device has always something to compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from sfumato.data.batch import Batch
from sfumato.data.loader import Step
from sfumato.loss import SampleLosses
from sfumato.memory.device_memory import forget_peak_memory, read_free_memory, read_peak_memory
from sfumato.memory.spill import SpillWatch
from sfumato.memory.transfer import Fetched, Moment, Transfer
from sfumato.plan import RunPlan
from sfumato.track.metrics_logger import MicroBatchLosses, StepValues
from sfumato.track.progress import Speed
from sfumato.training.nonfinite import NonfiniteGuard, TrainingCheck
from sfumato.training.step_owner import Verdict
from sfumato.training.step_trace import StepTrace, make_step_trace


class StepResult(NamedTuple):
    """What a step gives, all of it on the device; nothing waits."""

    loss: Tensor  # 0-d, summed over all processes
    grad_norm: Tensor  # 0-d, of all gradients before they are clipped
    samples: Sequence[SampleLosses]  # of this process, one for each micro-batch
    verdict: Verdict
    measured: Mapping[str, Tensor]  # of the training check


@dataclass(kw_only=True)
class Outcome:
    """One step's numbers on their way to the host; reading them waits for that step alone."""

    step: Step
    fetched: Fetched
    samples: Sequence[Tensor]  # t of each micro-batch, on the CPU
    curves: Sequence[str]
    groups: Sequence[str]  # of the training check
    asked: Moment  # for its data
    started: Moment
    ended: Moment
    peak_memory: int | None  # bytes, since the networks were loaded

    @cached_property
    def numbers(self) -> dict[str, Tensor]:
        return self.fetched.read()

    @property
    def finite(self) -> bool:
        """Whether the optimizer has taken the step."""
        return bool(self.numbers["finite"])

    @property
    def sound(self) -> bool:
        """False for a step that is told of as skipped."""
        return bool(self.numbers["sound"])

    @property
    def measured(self) -> dict[str, Tensor]:
        return {name: self.numbers[f"group {name}"] for name in self.groups}

    @cached_property
    def speed(self) -> Speed:
        assert self.numbers  # only then the moments are over
        seconds = self.ended.seconds_since(self.asked)
        return Speed(seconds=seconds, images=self.step.real_samples, peak_memory=self.peak_memory)

    @property
    def seconds_computing(self) -> float:
        """Without the wait for data."""
        assert self.numbers
        return self.ended.seconds_since(self.started)

    def read(self) -> StepValues:
        return StepValues(
            loss=float(self.numbers["loss"]),
            curves={name: float(self.numbers[f"curve {name}"]) for name in self.curves},
            samples=[
                MicroBatchLosses(t, self.numbers[f"sample losses {i}"], batch.image_numbers)
                for i, (t, batch) in enumerate(zip(self.samples, self.step.batches, strict=True))
            ],
            speed=self.speed,
        )


def make_outcomes(
    plan: RunPlan,
    device: torch.device,
    optimizer: Optimizer,
    *,
    first_step: int = 0,
    is_main: bool = True,
    sees_gradients: bool = True,
) -> Outcomes:
    """For a run that goes on from this step. sees_gradients: whether parameters have theirs after a step."""
    trace = make_step_trace(plan, device, first_step=first_step, is_main=is_main)
    check = TrainingCheck(optimizer, sees_gradients=sees_gradients)
    return Outcomes(device, check, trace, limit=plan.config.loop.max_bad_steps)


class Outcomes:
    """The step whose numbers are on their way, and what looks at them when they are there."""

    def __init__(self, device: torch.device, check: TrainingCheck, trace: StepTrace, *, limit: int) -> None:
        """limit: skipped steps in a row that end the run."""
        self.trace = trace
        self.transfer = Transfer(device)
        self.guard = NonfiniteGuard(limit=limit)
        self.check = check
        self.spill = SpillWatch()
        self.pending: Outcome | None = None
        forget_peak_memory(device)
        self.asked = self.started = self.transfer.mark()

    def mark_asked(self) -> None:
        """Call before the data of a step is asked for; what came before does not count in the step's time."""
        self.trace.before_step()
        self.asked = self.transfer.mark()

    def mark_start(self) -> None:
        """Call when a step has its data."""
        self.started = self.transfer.mark()

    def fetch(self, step: Step, result: StepResult, curves: Mapping[str, Tensor]) -> Outcome:
        """Call when all of a step is launched."""
        ended = self.transfer.mark()
        numbers = {"loss": result.loss, **result.verdict._asdict()}
        numbers |= {f"curve {name}": value for name, value in curves.items()}
        numbers |= {f"group {name}": value for name, value in result.measured.items()}
        numbers |= {f"sample losses {i}": sample.loss for i, sample in enumerate(result.samples)}
        fetched = self.transfer.fetch(numbers)
        self.trace.after_step()
        return Outcome(
            step=step,
            fetched=fetched,
            samples=[sample.t for sample in result.samples],
            curves=list(curves),
            groups=list(result.measured),
            asked=self.asked,
            started=self.started,
            ended=ended,
            peak_memory=read_peak_memory(self.transfer.device),
        )

    def find_spill(self, outcome: Outcome) -> str:
        """What to say of a step that was slow because the device's memory is full; empty for any other."""
        shapes = [find_batch_shape(batch) for batch in outcome.step.batches]
        return self.spill.check_step(shapes, outcome.seconds_computing, lambda: read_free_memory(self.transfer.device))


def find_batch_shape(batch: Batch) -> tuple[int, ...]:
    """Of latents or pixels; where there are neither, the number of samples and their size."""
    images = batch.pixels if batch.latents is None else batch.latents
    return (len(batch.ids), *batch.sizes.target[0].tolist()) if images is None else tuple(images.shape)
