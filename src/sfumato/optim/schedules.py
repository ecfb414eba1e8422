"""Learning-rate schedules: flat functions (optimizer step, shape) -> factor of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sfumato.common.registry import Registry, did_you_mean
from sfumato.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScheduleShape:
    """The parameters of all schedules; lengths in optimizer steps, the first of which is 0."""

    total: int
    warmup: int = 0
    decay: int = 0  # steps of the decay at the end
    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    floor: float = 0.0  # lowest factor
    peak: float = 1.0  # the learning rate at factor 1


Schedule = Callable[..., float]  # (step, shape), and the keywords of --lr_scheduler_args
LR_SCHEDULES: Registry[Schedule] = Registry("learning rate schedule")


def warmup(step: int, shape: ScheduleShape) -> float:
    """The linear warmup, 1 once it is over."""
    return min(1.0, step / max(1, shape.warmup)) if step < shape.warmup else 1.0


def progress_after_warmup(step: int, shape: ScheduleShape) -> float:
    """Share of the steps after the warmup that is done, 0 .. 1."""
    return min(1.0, max(0, step - shape.warmup) / max(1, shape.total - shape.warmup))


def cosine_wave(cycles: float, progress: float) -> float:
    """`cycles` periods of a cosine between 1 and 0."""
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * progress))


@LR_SCHEDULES.register("constant")
def constant(step: int, shape: ScheduleShape, /) -> float:
    return 1.0


@LR_SCHEDULES.register("constant_with_warmup")
def constant_with_warmup(step: int, shape: ScheduleShape, /) -> float:
    return warmup(step, shape)


@LR_SCHEDULES.register("linear")
def linear(step: int, shape: ScheduleShape, /) -> float:
    return warmup(step, shape) if step < shape.warmup else 1.0 - progress_after_warmup(step, shape)


@LR_SCHEDULES.register("cosine")
def cosine(step: int, shape: ScheduleShape, /) -> float:
    """Half a cosine down to 0 (Loshchilov & Hutter 2017, eq. 5, without restarts)."""
    if step < shape.warmup:
        return warmup(step, shape)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress_after_warmup(step, shape))))


@LR_SCHEDULES.register("cosine_with_restarts")
def cosine_with_restarts(step: int, shape: ScheduleShape, /) -> float:
    """Half a cosine down to 0, `cycles` times (Loshchilov & Hutter 2017, eq. 5, periods of equal length)."""
    progress = progress_after_warmup(step, shape)
    if step < shape.warmup or progress >= 1.0:
        return warmup(step, shape) if step < shape.warmup else 0.0
    return max(0.0, cosine_wave(0.5, shape.cycles * progress % 1.0))


@LR_SCHEDULES.register("cosine_with_min_lr")
def cosine_with_min_lr(step: int, shape: ScheduleShape, /) -> float:
    """`cycles` half waves of a cosine between 1 and the floor."""
    if step < shape.warmup:
        return warmup(step, shape)
    return shape.floor + (1.0 - shape.floor) * cosine_wave(shape.cycles / 2, progress_after_warmup(step, shape))


@LR_SCHEDULES.register("polynomial")
def polynomial(step: int, shape: ScheduleShape, /, *, lr_end: float = 1e-7) -> float:
    """(1 - progress)^power, down to the learning rate `lr_end`."""
    if shape.peak <= lr_end:
        raise UserError(
            f"the polynomial schedule decays to a learning rate of {lr_end:g}, but starts at {shape.peak:g}",
            code="polynomial-end-not-lower",
            fix="raise the learning rate, or give a lower --lr_scheduler_args lr_end=X",
        )
    if step < shape.warmup:
        return warmup(step, shape)
    floor = lr_end / shape.peak
    return floor + (1.0 - floor) * (1.0 - progress_after_warmup(step, shape)) ** shape.power


@LR_SCHEDULES.register("inverse_sqrt")
def inverse_sqrt(step: int, shape: ScheduleShape, /) -> float:
    """1 / sqrt(1 + s / timescale), s steps after the warmup; the time scale defaults to the warmup's length."""
    if step < shape.warmup:
        return warmup(step, shape)
    timescale = shape.timescale or shape.warmup or 10_000
    return 1.0 / math.sqrt(1.0 + (step - shape.warmup) / timescale)


@LR_SCHEDULES.register("warmup_stable_decay")
def warmup_stable_decay(
    step: int, shape: ScheduleShape, /, *, warmup_type: str = "linear", decay_type: str = "cosine"
) -> float:
    """Up from the floor, constant, and down to the floor over the last `decay` steps (Hu et al. 2024, sec. 4)."""
    decay_start = shape.total - shape.decay
    if step < shape.warmup:
        height = decay_shape(warmup_type, 1.0 - step / shape.warmup, cycles=1)
    elif step < decay_start or not shape.decay:
        height = 1.0
    else:
        height = decay_shape(decay_type, min(1.0, (step - decay_start) / shape.decay), cycles=shape.cycles)
    return shape.floor + (1.0 - shape.floor) * height


def decay_shape(form: str, progress: float, *, cycles: int) -> float:
    """1 at progress 0, 0 at progress 1; a cosine of several half waves rises in between."""
    forms = {
        "linear": 1.0 - progress,
        "cosine": cosine_wave(cycles / 2, progress),
        "1-sqrt": 1.0 - math.sqrt(progress),
    }
    if form not in forms:
        raise UserError(
            f"--lr_scheduler_args: unknown warmup_type or decay_type {form!r}",
            code="decay-type-unknown",
            fix=did_you_mean(form, forms),
        )
    return forms[form]


@LR_SCHEDULES.register("piecewise_constant")
def piecewise_constant(step: int, shape: ScheduleShape, /, *, step_rules: str = "") -> float:
    """step_rules "1:10,0.1:20,0.01": factor 1 before step 10, 0.1 before step 20, then 0.01."""
    try:
        *pieces, last = str(step_rules).split(",")
        factors: dict[int, float] = {}
        for piece in pieces:
            factor, end = piece.split(":")
            factors[int(end)] = float(factor)
        return next((factors[end] for end in sorted(factors) if step < end), float(last))
    except ValueError as error:
        raise UserError(
            f"the schedule piecewise_constant cannot read step_rules {step_rules!r}",
            code="step-rules-invalid",
            fix="e.g. --lr_scheduler_args step_rules=1:100,0.1:200,0.01 for factor 1 until step 100, 0.1 until 200",
        ) from error
