"""Learning rate schedules: flat functions (step, shape) -> factor. They count optimizer steps, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sfumato.common.registry import Registry, did_you_mean
from sfumato.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a schedule may ask; all lengths in optimizer steps, the first of which is 0."""

    total: int
    warmup: int = 0
    decay: int = 0  # steps of the fall at the end
    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    floor: float = 0.0  # lowest factor
    peak: float = 1.0  # the learning rate at factor 1


Schedule = Callable[..., float]  # (step, shape), and the keywords of --lr_scheduler_args
SCHEDULES: Registry[Schedule] = Registry("learning rate schedule")


def rising(step: int, shape: Shape) -> float:
    """The linear warm-up, 1 once it is over."""
    return min(1.0, step / max(1, shape.warmup)) if step < shape.warmup else 1.0


def progress(step: int, shape: Shape) -> float:
    """Share of the steps after the warm-up that is done, 0 .. 1."""
    return min(1.0, max(0, step - shape.warmup) / max(1, shape.total - shape.warmup))


def wave(cycles: float, done: float) -> float:
    """`cycles` periods of a cosine between 1 and 0."""
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * done))


@SCHEDULES.register("constant")
def constant(step: int, shape: Shape, /) -> float:
    return 1.0


@SCHEDULES.register("constant_with_warmup")
def constant_with_warmup(step: int, shape: Shape, /) -> float:
    return rising(step, shape)


@SCHEDULES.register("linear")
def linear(step: int, shape: Shape, /) -> float:
    return rising(step, shape) if step < shape.warmup else 1.0 - progress(step, shape)


@SCHEDULES.register("cosine")
def cosine(step: int, shape: Shape, /) -> float:
    """Half a cosine down to 0 (Loshchilov & Hutter 2017, eq. 5, without restarts)."""
    if step < shape.warmup:
        return rising(step, shape)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress(step, shape))))


@SCHEDULES.register("cosine_with_restarts")
def cosine_with_restarts(step: int, shape: Shape, /) -> float:
    """Half a cosine down to 0, `cycles` times (Loshchilov & Hutter 2017, eq. 5, periods of equal length)."""
    done = progress(step, shape)
    if step < shape.warmup or done >= 1.0:
        return rising(step, shape) if step < shape.warmup else 0.0
    return max(0.0, wave(0.5, shape.cycles * done % 1.0))


@SCHEDULES.register("cosine_with_min_lr")
def cosine_with_min_lr(step: int, shape: Shape, /) -> float:
    """`cycles` half waves of a cosine between 1 and the floor."""
    if step < shape.warmup:
        return rising(step, shape)
    return shape.floor + (1.0 - shape.floor) * wave(shape.cycles / 2, progress(step, shape))


@SCHEDULES.register("polynomial")
def polynomial(step: int, shape: Shape, /, *, lr_end: float = 1e-7) -> float:
    """(1 - progress)^power, down to the learning rate `lr_end`."""
    if shape.peak <= lr_end:
        raise UserError(
            f"the polynomial schedule falls to a learning rate of {lr_end:g}, and it starts at {shape.peak:g}",
            fix="raise the learning rate, or give a lower --lr_scheduler_args lr_end=X",
        )
    if step < shape.warmup:
        return rising(step, shape)
    floor = lr_end / shape.peak
    return floor + (1.0 - floor) * (1.0 - progress(step, shape)) ** shape.power


@SCHEDULES.register("inverse_sqrt")
def inverse_sqrt(step: int, shape: Shape, /) -> float:
    """1 / sqrt(1 + s / timescale), s steps after the warm-up; without a time scale it is the warm-up's length."""
    if step < shape.warmup:
        return rising(step, shape)
    timescale = shape.timescale or shape.warmup or 10_000
    return 1.0 / math.sqrt(1.0 + (step - shape.warmup) / timescale)


@SCHEDULES.register("warmup_stable_decay")
def warmup_stable_decay(
    step: int, shape: Shape, /, *, warmup_type: str = "linear", decay_type: str = "cosine"
) -> float:
    """Up from the floor, level, and down to the floor over the last `decay` steps (Hu et al. 2024, sec. 4)."""
    falls = shape.total - shape.decay
    if step < shape.warmup:
        height = fall(warmup_type, 1.0 - step / shape.warmup, cycles=1)
    elif step < falls or not shape.decay:
        height = 1.0
    else:
        height = fall(decay_type, min(1.0, (step - falls) / shape.decay), cycles=shape.cycles)
    return shape.floor + (1.0 - shape.floor) * height


def fall(form: str, done: float, *, cycles: int) -> float:
    """1 where nothing is `done`, 0 where all is (a cosine of several half waves comes up again)."""
    forms = {"linear": 1.0 - done, "cosine": wave(cycles / 2, done), "1-sqrt": 1.0 - math.sqrt(done)}
    if form not in forms:
        raise UserError(f"--lr_scheduler_args: there is no form {form!r}", fix=did_you_mean(form, forms))
    return forms[form]


@SCHEDULES.register("piecewise_constant")
def piecewise_constant(step: int, shape: Shape, /, *, step_rules: str = "") -> float:
    """step_rules "1:10,0.1:20,0.01": factor 1 before step 10, 0.1 before step 20, then 0.01."""
    try:
        *pieces, last = str(step_rules).split(",")
        factors = {int(end): float(factor) for factor, end in (piece.split(":") for piece in pieces)}
        return next((factors[end] for end in sorted(factors) if step < end), float(last))
    except ValueError as error:
        raise UserError(
            "piecewise_constant needs its steps and factors",
            fix="as --lr_scheduler_args step_rules=1:100,0.1:200,0.01 for factor 1 until step 100, 0.1 until 200",
        ) from error
