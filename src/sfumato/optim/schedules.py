"""Learning rate schedules: flat functions (step, shape) -> factor. They count optimizer steps, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

from sfumato.config import OptimOptions
from sfumato.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a schedule may ask, all in optimizer steps; `step` counts from 0."""

    total: int
    warmup: int


Schedule = Callable[[int, Shape], float]
SCHEDULES: Registry[Schedule] = Registry("learning rate schedule")


def rising(step: int, shape: Shape) -> float:
    """The linear warm-up, 1 once it is over."""
    return min(1.0, step / max(1, shape.warmup)) if step < shape.warmup else 1.0


def progress(step: int, shape: Shape) -> float:
    """Share of the steps after the warm-up that is done, 0 .. 1."""
    return min(1.0, max(0, step - shape.warmup) / max(1, shape.total - shape.warmup))


@SCHEDULES.register("constant")
def constant(step: int, shape: Shape) -> float:
    return 1.0


@SCHEDULES.register("constant_with_warmup")
def constant_with_warmup(step: int, shape: Shape) -> float:
    return rising(step, shape)


@SCHEDULES.register("linear")
def linear(step: int, shape: Shape) -> float:
    return rising(step, shape) if step < shape.warmup else 1.0 - progress(step, shape)


@SCHEDULES.register("cosine")
def cosine(step: int, shape: Shape) -> float:
    """Half a cosine down to 0 (Loshchilov & Hutter 2017, eq. 5, without restarts)."""
    if step < shape.warmup:
        return rising(step, shape)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress(step, shape))))


@dataclass(frozen=True)
class Rates:
    """The schedule of one run applied to its optimizer; holds no state, so resuming needs none."""

    schedule: Schedule
    shape: Shape
    base: tuple[float, ...]

    def set(self, optimizer: Optimizer, step: int) -> None:
        """Give every parameter group its rate for the optimizer step with this index."""
        for group, base in zip(optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * self.schedule(step, self.shape)


def make_rates(optim: OptimOptions, optimizer: Optimizer, total: int) -> Rates:
    warmup = steps_of(optim.lr_warmup_steps, total)
    base = tuple(float(group["lr"]) for group in optimizer.param_groups)
    return Rates(SCHEDULES.get(optim.lr_scheduler), Shape(total=total, warmup=warmup), base)


def steps_of(value: int | float, total: int) -> int:
    """A number of steps given as such, or as a fraction of all steps below 1."""
    return int(value) if value >= 1 else int(value * total)
