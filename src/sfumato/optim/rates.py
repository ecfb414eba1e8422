"""The learning rates of one run: who sets them before each optimizer step, and what is shown of them."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from sfumato.common.registry import bind
from sfumato.config import OptimOptions
from sfumato.config.values import step_count
from sfumato.errors import UserError
from sfumato.optim.classes import find_class, needs_more
from sfumato.optim.schedules import SCHEDULES, Schedule, Shape

log = logging.getLogger(__name__)


class Rates(Protocol):
    def set(self, optimizer: Optimizer, step: int) -> None:
        """Give every parameter group its rate for the optimizer step with this index, the first of which is 0."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """A flat schedule, over each group's own rate; a function of the step, so there is nothing to save."""

    schedule: Schedule
    shape: Shape
    base: Sequence[float]

    def set(self, optimizer: Optimizer, step: int) -> None:
        for group, base in zip(optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * self.schedule(step, replace(self.shape, peak=base))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Relative:
    """AdaFactor's relative step (Shazeer & Stern 2018, sec. 9): the optimizer knows its rate, nobody sets it."""

    def set(self, optimizer: Optimizer, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Foreign:
    """A scheduler class of torch or of another package, which keeps a state of its own."""

    def __init__(self, scheduler: LRScheduler, name: str, arguments: Mapping[str, Any]) -> None:
        self.scheduler, self.name, self.arguments = scheduler, name, arguments

    def set(self, optimizer: Optimizer, step: int) -> None:
        with warnings.catch_warnings():  # that the optimizer must step first: it did, before a resume or an overflow
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            while self.scheduler.last_epoch < step:  # torch counts the calls of step() as epochs
                self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": self.arguments, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The saved schedule goes on as it was, with the rates and arguments that it began with."""
        if state.get("name") != self.name:
            raise UserError(
                f"the state was saved with another schedule than --lr_scheduler_type {self.name}",
                fix="give the schedule of the saved run, or start without --resume",
            )
        if state["scheduler"]["base_lrs"] != self.scheduler.base_lrs or state["arguments"] != self.arguments:
            log.warning("%s goes on as it was saved: other learning rates or arguments have no effect now", self.name)
        self.scheduler.load_state_dict(dict(state["scheduler"]))


def make_rates(optim: OptimOptions, optimizer: Optimizer, total: int) -> Rates:
    """What moves the rates over `total` optimizer steps. A schedule-free optimizer keeps them still."""
    if optim.relative_step:
        return Relative()
    if optim.lr_scheduler_type and not optim.schedule_free:
        return foreign(optim, optimizer)
    base = tuple(float(group["lr"]) for group in optimizer.param_groups)
    rates = Scheduled(schedule=choose_schedule(optim), shape=make_shape(optim, total), base=base)
    for rate in base:
        rates.schedule(0, replace(rates.shape, peak=rate))  # refuses what it cannot do before the first step
    return rates


def check_schedule(optim: OptimOptions, total: int) -> None:
    """What can be told of the schedule before there are parameters; UserError for what cannot work."""
    if optim.lr_scheduler_type:
        choose_foreign(optim)
    elif not optim.relative_step:
        choose_schedule(optim)(0, make_shape(optim, total))


def choose_schedule(optim: OptimOptions) -> Schedule:
    """The named schedule, given its own arguments; a schedule-free optimizer has none."""
    if optim.schedule_free:
        return SCHEDULES.get("constant")
    schedule = SCHEDULES.get(optim.lr_scheduler)
    where = f"--lr_scheduler_args: {optim.lr_scheduler}"
    return partial(schedule, **bind(schedule, optim.lr_scheduler_args, where=where))


def make_shape(optim: OptimOptions, total: int) -> Shape:
    """The schedule's numbers in steps; shares are of `total`."""
    warmup, decay = step_count(optim.lr_warmup_steps, total), step_count(optim.lr_decay_steps, total)
    if warmup + decay > total:
        raise UserError(
            f"--lr_warmup_steps ({warmup}) and --lr_decay_steps ({decay}) do not fit into {total} steps",
            fix="give fewer, or shares of all steps as 10%",
        )
    return Shape(
        total=total,
        warmup=warmup,
        decay=decay,
        cycles=optim.lr_scheduler_num_cycles,
        power=optim.lr_scheduler_power,
        timescale=optim.lr_scheduler_timescale,
        floor=optim.lr_scheduler_min_lr_ratio or 0.0,
    )


def choose_foreign(optim: OptimOptions) -> Any:
    """What --lr_scheduler_type names, with the names of its arguments checked."""
    name, option = optim.lr_scheduler_type, "--lr_scheduler_type"
    found = find_class(name, option=option, home=lr_scheduler, base=LRScheduler)
    if inspect.isclass(found) and (not issubclass(found, LRScheduler) or needs_more(found.step)):
        raise UserError(f"{option} {name} is no schedule over steps alone")
    bind(found, optim.lr_scheduler_args, where=f"--lr_scheduler_args: {name}")
    return found


def foreign(optim: OptimOptions, optimizer: Optimizer) -> Foreign:
    name, arguments = optim.lr_scheduler_type, optim.lr_scheduler_args
    make = choose_foreign(optim)
    try:
        scheduler = make(optimizer, **arguments)
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(f"{name} cannot be made of these arguments: {error}", fix="--lr_scheduler_args") from error
    if not isinstance(scheduler, LRScheduler) or needs_more(type(scheduler).step):
        raise UserError(f"--lr_scheduler_type {name} is no schedule over steps alone")
    if not is_plain(scheduler.state_dict()):
        raise UserError(f"--lr_scheduler_type {name} has a state that cannot be saved")
    return Foreign(scheduler, name, arguments)


def is_plain(value: Any) -> bool:
    """Whether a saved state can hold this."""
    if isinstance(value, Mapping):
        return all(isinstance(key, int | str) and is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def shown_rates(optimizer: Optimizer) -> dict[str, float]:
    """Series name -> rate of the last step; an optimizer that finds a factor d of its own adds d * rate."""
    shown: dict[str, float] = {}
    for group in optimizer.param_groups:
        rate: float = relative_rate(optimizer, group) if group["lr"] is None else group["lr"]
        shown[group["name"]] = rate
        if "d" in group:
            shown[f"d*lr/{group['name']}"] = float(group["d"]) * rate
    return shown


def relative_rate(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """min(1e-2, 1 / sqrt(t)), or min(1e-6 t, 1 / sqrt(t)) with a warm-up: before each tensor's own scale."""
    steps = next((optimizer.state[each]["step"] for each in group["params"] if each in optimizer.state), 0)
    if not steps:
        return 0.0
    return min(1e-6 * steps if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(steps))
