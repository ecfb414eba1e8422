"""The optimizer and what surrounds it: schedule, scaler, half-precision steps, EMA; all of it is part of the state."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sfumato.config import Config
from sfumato.diffusion.uncertainty import UNCERTAINTY_GROUP, Uncertainty, make_uncertainty
from sfumato.memory.fused_backward import FusedBackward
from sfumato.optim.ema import EmaSet
from sfumato.optim.groups import ParameterGroup
from sfumato.optim.half_scaler import HalfGradScaler, make_scaler
from sfumato.optim.half_stepper import HalfStepper, make_half_stepper
from sfumato.optim.lr_schedule import LrSchedule, make_lr_schedule
from sfumato.optim.optimizers import make_optimizer
from sfumato.optim.skipping import step_where
from sfumato.plan import RunPlan
from sfumato.training.block_setup import PreparedNetworks, make_fused_backward
from sfumato.training.run_state import WEIGHTS, OptimizerState, RunState, ScalerState, UncertaintyState
from sfumato.training.start_point import StartPoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OptimizerSetup:
    """What takes the steps."""

    optimizer: Optimizer
    lr_schedule: LrSchedule
    scaler: GradScaler  # does nothing but in fp16
    half_stepper: HalfStepper | None  # where weights are in half precision
    parameters: list[nn.Parameter]  # of the method
    uncertainty: Uncertainty | None  # learned weights of the loss
    ema: EmaSet
    fused: FusedBackward | None  # where it steps while backward runs

    def unscale_norm(self, norm: Tensor) -> Tensor:
        """The norm of the gradients from that of those that the scaler has left."""
        return norm / self.scaler.read_scale() if isinstance(self.scaler, HalfGradScaler) else norm

    def take_step(self, step: int, taken: Tensor) -> None:
        """The optimizer step with this index, where `taken`, 0-d bool on the device, holds."""
        stepper = self.half_stepper
        step_where(taken, self.optimizer, self.optimizer.step if stepper is None else partial(stepper.step, step))


def set_up_optimizer(
    plan: RunPlan, networks: PreparedNetworks, start: StartPoint, state: RunState, device: torch.device
) -> OptimizerSetup:
    """Make everything and add it to the state; a resumed run goes on with what was saved."""
    config, groups = plan.config, networks.groups
    state.add(WEIGHTS, plan.method)
    uncertainty = make_uncertainty(config.loss, plan.seed, device)
    state.add("uncertainty", UncertaintyState(uncertainty))
    optimizer = make_optimizer(config.optim, [*groups, *uncertainty_groups(config, uncertainty)])
    lr_schedule = make_lr_schedule(config.optim, optimizer, plan.total_steps - start.schedule)
    memory = config.memory
    scaler = make_scaler(device, mixed=memory.mixed_precision == "fp16", full=memory.full_fp16)
    state.add("optimizer", OptimizerState(optimizer))
    state.add("lr_schedule", lr_schedule)
    state.add("scaler", ScalerState(scaler))
    parameters = [parameter for group in groups for parameter in group.parameters]
    stepper = make_half_stepper(memory, optimizer, plan.seed, scaler)
    return OptimizerSetup(
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        scaler=scaler,
        half_stepper=stepper,
        fused=make_fused_backward(config.optim, optimizer, networks, stepper),
        parameters=parameters,
        uncertainty=uncertainty,
        ema=state.add("ema", EmaSet(config.ema, parameters)),
    )


def uncertainty_groups(config: Config, uncertainty: Uncertainty | None) -> Iterator[ParameterGroup]:
    """It has its own learning rate and no weight decay."""
    if uncertainty:
        learning_rate, parameters = config.loss.uncertainty_lr, list(uncertainty.parameters())
        yield ParameterGroup(name=UNCERTAINTY_GROUP, parameters=parameters, learning_rate=learning_rate, decays=False)
