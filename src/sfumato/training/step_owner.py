"""Who takes the optimizer's step: after backward, or while backward runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sfumato.memory.fused_backward import FusedBackward
from sfumato.optim.half_scaler import HalfGradScaler, list_infinities
from sfumato.optim.half_stepper import HalfStepper
from sfumato.optim.skipping import step_where
from sfumato.parallel.base import Engine, ParallelStrategy


class Verdict(NamedTuple):
    """What a step's loss and gradients were like; 0-d bool, on the device."""

    finite: Tensor  # whether the optimizer takes the step
    sound: Tensor  # False for a step that is told of as skipped


def judge_step(loss: Tensor, norm: Tensor, scale: Tensor) -> Verdict:
    """0-d: the loss, the norm of all gradients, and the loss scale, 1 without float16.

    Infinite gradients under a loss scale above 1 are nothing to tell of: the scaler lowers it.
    """
    finite = torch.isfinite(loss + norm)
    return Verdict(finite=finite, sound=finite | (torch.isfinite(loss) & (scale > 1)))


class StepOwner(Protocol):
    """Has the gradients of a step, from its first backward to the optimizer's step. Nothing waits for the device."""

    mid_step: bool  # whether the optimizer has begun a step that is not complete
    in_backward: ClassVar[bool]  # whether each weight steps, or skips the step, by itself
    keeps_gradients: ClassVar[bool]  # whether parameters have their gradients after a step

    def forget_gradients(self) -> None:
        """Before the first backward of a step, or where its gradients are to be forgotten."""
        ...

    def backward(self, loss: Tensor, index: int, total: Tensor, *, is_last: bool) -> None:
        """The backward of one batch of the step with this index. total: of its batches up to this one, 0-d."""
        ...

    def finish(self, index: int, total: Tensor) -> tuple[Tensor, Verdict]:
        """The optimizer takes the step, or skips one that is not finite; `total` becomes the sum over all processes.

        Gives the norm of all gradients before they are clipped, 0-d, and what they were like.
        """
        ...

    def make_state(self) -> None:
        """Let the optimizer make its state, by a step whose gradients are 0."""
        ...


@dataclass(kw_only=True)
class StepAfterBackward:
    """Gradients are summed over all processes, clipped by their norm, and stepped with."""

    optimizer: Optimizer
    scaler: GradScaler
    stepper: HalfStepper | None
    parallel: ParallelStrategy
    parameters: Sequence[nn.Parameter]  # of the method
    further: Sequence[nn.Parameter]  # that count neither in the norm nor in clipping
    max_grad_norm: float  # 0: no clipping
    mid_step: bool = False
    in_backward: ClassVar[bool] = False
    keeps_gradients: ClassVar[bool] = True

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.parallel.forget_gradients()

    def backward(self, loss: Tensor, index: int, total: Tensor, *, is_last: bool) -> None:
        self.scaler.scale(loss).backward()

    def finish(self, index: int, total: Tensor) -> tuple[Tensor, Verdict]:
        self.parallel.read_facts(self.parallel.reduce([*self.parameters, *self.further], total))
        self.scaler.unscale_(self.optimizer)
        for found in list_infinities(self.scaler, self.optimizer):
            found.copy_(self.parallel.join_findings({"": found})[""])
        norm = self.parallel.total_norm(self.parameters)
        if isinstance(self.scaler, HalfGradScaler):  # which has left the gradients as they are
            norm = norm / self.scaler.read_scale()
        verdict = judge_step(total, norm, self.scaler.scale(torch.ones_like(total)))
        if self.max_grad_norm > 0:
            self.parallel.clip(self.parameters, self.max_grad_norm, norm)
        self._take(index, verdict.finite)
        self.scaler.update()
        return norm, verdict

    def make_state(self) -> None:
        for parameter in [*self.parameters, *self.further]:
            parameter.grad = torch.zeros_like(parameter)
        device = self.parallel.device
        self.scaler.scale(torch.zeros((), device=device))  # makes its state, too
        self.scaler.unscale_(self.optimizer)
        self._take(0, torch.ones((), dtype=torch.bool, device=device))
        self.scaler.update()

    def _take(self, index: int, taken: Tensor) -> None:
        """The optimizer step with this index, where `taken`, 0-d bool on the device, holds."""
        self.mid_step = True
        stepper = self.stepper
        step_where(taken, self.optimizer, self.optimizer.step if stepper is None else partial(stepper.step, index))


@dataclass(kw_only=True)
class StepInBackward:
    """Weights step as soon as their gradients are there, so that the step is complete only after backward."""

    optimizer: Optimizer
    scaler: GradScaler
    fused: FusedBackward
    mid_step: bool = False
    in_backward: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, index: int, total: Tensor, *, is_last: bool) -> None:
        if is_last:
            self.mid_step = True
            self.fused.start(index, total)
        else:
            self.fused.accumulate()
        self.scaler.scale(loss).backward()

    def finish(self, index: int, total: Tensor) -> tuple[Tensor, Verdict]:
        norm = self.fused.finish()
        self.scaler.update()
        return norm, judge_step(total, norm, torch.ones_like(total))

    def make_state(self) -> None:
        self.fused.make_state()


@dataclass(kw_only=True)
class StepByEngine:
    """A library's engine takes the step, whole: sums, norm, clipping and loss scale are its own."""

    engine: Engine
    parallel: ParallelStrategy
    mid_step: bool = False
    in_backward: ClassVar[bool] = False
    keeps_gradients: ClassVar[bool] = False

    def forget_gradients(self) -> None:
        self.engine.forget_gradients()

    def backward(self, loss: Tensor, index: int, total: Tensor, *, is_last: bool) -> None:
        self.engine.backward(loss, is_last=is_last)

    def finish(self, index: int, total: Tensor) -> tuple[Tensor, Verdict]:
        self.parallel.read_facts(self.parallel.reduce((), total))
        self.mid_step = True
        scale = self.engine.loss_scale
        norm, is_finite = self.engine.step()
        finite = torch.tensor(is_finite, device=total.device)
        sound = finite | (torch.isfinite(total) & (scale > 1))
        return torch.tensor(norm, device=total.device), Verdict(finite=finite, sound=sound)

    def make_state(self) -> None:
        """The engine makes it with its first step."""
