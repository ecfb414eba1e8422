"""Setting the learning rates before each optimizer step, and reading them for the logs."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from sfumato.common.registry import bind_arguments
from sfumato.config import OptimOptions
from sfumato.config.values import format_arguments, resolve_steps
from sfumato.errors import UserError
from sfumato.optim.classes import find_class, required_arguments
from sfumato.optim.schedules import LR_SCHEDULES, Schedule, ScheduleShape

log = logging.getLogger(__name__)
TRIED_STEPS = 5000  # of a class of torch, beforehand


class LrSchedule(Protocol):
    """Sets the learning rates of an optimizer's parameter groups."""

    def set(self, optimizer: Optimizer, step: int) -> None:
        """Set every parameter group's learning rate for the optimizer step with this index, the first of which is 0."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FlatSchedule:
    """A flat schedule times each group's own learning rate; a function of the step, so there is nothing to save."""

    schedule: Schedule
    shape: ScheduleShape
    base: Sequence[float]

    def set(self, optimizer: Optimizer, step: int) -> None:
        for group, base in zip(optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * self.schedule(step, replace(self.shape, peak=base))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class AdafactorSchedule:
    """AdaFactor's relative step (Shazeer & Stern 2018, sec. 9): the optimizer computes its own learning rate."""

    def set(self, optimizer: Optimizer, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class TorchSchedule:
    """A scheduler class of torch or of another package, with a state of its own."""

    def __init__(self, scheduler: LRScheduler, name: str, arguments: Mapping[str, Any]) -> None:
        self.scheduler, self.name, self.arguments = scheduler, name, arguments

    def set(self, optimizer: Optimizer, step: int) -> None:
        with warnings.catch_warnings():  # about the order of steps: a resume or an overflow looks like it
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            while self.scheduler.last_epoch < step:  # torch counts the calls of step() as epochs
                self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": self.arguments, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the saved schedule with its own learning rates and arguments; UserError where it is another one."""
        if state.get("name") != self.name:
            raise UserError(
                f"the state was saved with another schedule than --lr_scheduler_type {self.name}",
                code="resume-schedule-mismatch",
                fix="give the schedule of the saved run, or start without --resume",
            )
        if state["scheduler"]["base_lrs"] != self.scheduler.base_lrs or state["arguments"] != self.arguments:
            log.warning("%s continues as saved: changed learning rates or arguments are ignored", self.name)
        self.scheduler.load_state_dict(dict(state["scheduler"]))


def make_lr_schedule(optim: OptimOptions, optimizer: Optimizer, total: int) -> LrSchedule:
    """The schedule over `total` optimizer steps; constant for a schedule-free optimizer."""
    if optim.relative_step:
        return AdafactorSchedule()
    if optim.lr_scheduler_type and not optim.schedule_free:
        return make_torch_schedule(optim, optimizer)
    base = tuple(float(group["lr"]) for group in optimizer.param_groups)
    flat = FlatSchedule(schedule=choose_schedule(optim), shape=make_schedule_shape(optim, total), base=base)
    for lr in base:  # raises what the schedule cannot do before the first step
        flat.schedule(0, replace(flat.shape, peak=lr))
    return flat


def check_schedule(
    optim: OptimOptions, total: int, optimizer: Optimizer | None = None, learning_rates: Collection[float] = ()
) -> None:
    """Check the schedule before there are parameters; UserError for what cannot work at any of its steps.

    optimizer: one of the run's kind, for a class of torch's to be tried on. learning_rates: those that the run has.
    """
    if optim.lr_scheduler_type:
        find_torch_schedule(optim)
        if optimizer is not None and not optim.schedule_free and not optim.relative_step:
            try_torch_schedule(optim, optimizer, total)
    elif not optim.relative_step:
        schedule, shape = choose_schedule(optim), make_schedule_shape(optim, total)
        for step in (0, 1, shape.warmup, total - shape.decay, total - 1):
            try_schedule(schedule, max(0, min(step, total - 1)), shape, optim)
        for lr in learning_rates:
            try_schedule(schedule, 0, replace(shape, peak=lr), optim)


def try_schedule(schedule: Schedule, step: int, shape: ScheduleShape, optim: OptimOptions) -> None:
    """UserError where the schedule cannot use the values of its arguments."""
    try:
        schedule(step, shape)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"--lr_scheduler {optim.lr_scheduler} cannot use {' '.join(format_arguments(optim.lr_scheduler_args))}: "
            f"{error}",
            code="schedule-arguments-refused",
            fix="check --lr_scheduler_args",
        ) from error


def try_torch_schedule(optim: OptimOptions, optimizer: Optimizer, total: int) -> None:
    """UserError where the class refuses its arguments, at once or at a later step.

    Lists may hold a value for each parameter group, whose number nobody knows yet; such arguments are not tried.
    """
    if any(isinstance(value, list | tuple) for value in optim.lr_scheduler_args.values()):
        return
    schedule = make_torch_schedule(optim, optimizer)
    try:
        for step in range(min(total, TRIED_STEPS)):
            schedule.set(optimizer, step)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"--lr_scheduler_type {optim.lr_scheduler_type} fails with its arguments: {error}",
            code="scheduler-fails-later",
            fix="check --lr_scheduler_args",
        ) from error


def describe_schedule(optim: OptimOptions, total: int) -> Iterator[str]:
    """What the user should know of a warmup or decay that does not end within the run."""
    if optim.schedule_free or optim.relative_step or optim.lr_scheduler_type or optim.lr_scheduler == "constant":
        return
    shape = make_schedule_shape(optim, total)
    decay = shape.decay if optim.lr_scheduler == "warmup_stable_decay" else 0
    if shape.warmup > total:
        yield f"--lr_warmup_steps ({shape.warmup}) is longer than the run: its {total} steps stay in the warmup"
    elif decay > total:
        yield f"--lr_decay_steps ({decay}) is longer than the run: its {total} steps are the end of the decay"
    elif shape.warmup + decay > total:
        yield (
            f"--lr_warmup_steps ({shape.warmup}) and --lr_decay_steps ({decay}) overlap in {total} steps: the learning "
            "rate jumps from the end of the warmup into the decay"
        )


def choose_schedule(optim: OptimOptions) -> Schedule:
    """The schedule of --lr_scheduler with its arguments bound; constant for a schedule-free optimizer."""
    if optim.schedule_free:
        return LR_SCHEDULES.get("constant")
    schedule = LR_SCHEDULES.get(optim.lr_scheduler)
    where = f"--lr_scheduler_args: {optim.lr_scheduler}"
    return partial(schedule, **bind_arguments(schedule, optim.lr_scheduler_args, where=where))


def make_schedule_shape(optim: OptimOptions, total: int) -> ScheduleShape:
    """The schedule's parameters in steps; shares are of `total`."""
    return ScheduleShape(
        total=total,
        warmup=resolve_steps(optim.lr_warmup_steps, total),
        decay=resolve_steps(optim.lr_decay_steps, total),
        cycles=optim.lr_scheduler_num_cycles,
        power=optim.lr_scheduler_power,
        timescale=optim.lr_scheduler_timescale,
        floor=optim.lr_scheduler_min_lr_ratio or 0.0,
    )


def find_torch_schedule(optim: OptimOptions) -> Any:
    """The class or function of --lr_scheduler_type, with the names of its arguments checked."""
    name, option = optim.lr_scheduler_type, "--lr_scheduler_type"
    factory = find_class(name, option=option, default_module=lr_scheduler, base=LRScheduler)
    if inspect.isclass(factory):
        check_steps_alone(factory, name)
    bind_arguments(factory, optim.lr_scheduler_args, where=f"--lr_scheduler_args: {name}")
    return factory


def check_steps_alone(scheduler_class: type, name: str) -> None:
    """Raise UserError for a class that is no LRScheduler, or whose step() needs e.g. a loss."""
    if not issubclass(scheduler_class, LRScheduler) or required_arguments(scheduler_class.step):
        raise UserError(
            f"--lr_scheduler_type {name} is not a schedule that depends on the step alone",
            code="scheduler-not-step-based",
        )


def make_torch_schedule(optim: OptimOptions, optimizer: Optimizer) -> TorchSchedule:
    """UserError where the class refuses its arguments, or has a state that cannot be saved."""
    name, arguments = optim.lr_scheduler_type, optim.lr_scheduler_args
    factory = find_torch_schedule(optim)
    try:
        scheduler = factory(optimizer, **arguments)
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"--lr_scheduler_type {name} refuses its arguments: {error}",
            code="scheduler-arguments-refused",
            fix="check --lr_scheduler_args",
        ) from error
    check_steps_alone(type(scheduler), name)
    if not is_plain(scheduler.state_dict()):
        raise UserError(
            f"--lr_scheduler_type {name} has a state that cannot be saved", code="scheduler-state-not-plain"
        )
    return TorchSchedule(scheduler, name, arguments)


def is_plain(value: Any) -> bool:
    """Whether a saved state can hold this."""
    if isinstance(value, Mapping):
        return all(isinstance(key, int | str) for key in value) and all(is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def current_learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Series name -> learning rate of the last step; for an optimizer with a factor d of its own also d * lr."""
    series: dict[str, float] = {}
    for group in optimizer.param_groups:
        lr: float = adafactor_learning_rate(optimizer, group) if group["lr"] is None else group["lr"]
        series[group["name"]] = lr
        if "d" in group:
            series[f"d*lr/{group['name']}"] = float(group["d"]) * lr
    return series


def adafactor_learning_rate(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """min(1e-2, 1 / sqrt(t)), with a warmup min(1e-6 t, 1 / sqrt(t)); before the scale of each tensor."""
    states = (optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state)
    steps = next((state["step"] for state in states), 0)
    if not steps:
        return 0.0
    return min(1e-6 * steps if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(steps))
