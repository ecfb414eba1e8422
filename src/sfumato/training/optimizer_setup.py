"""The optimizer and what surrounds it: schedule, scaler, half-precision steps, EMA; all of it is part of the state."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sfumato.config import Config
from sfumato.diffusion.uncertainty import UNCERTAINTY_GROUP, Uncertainty, make_uncertainty
from sfumato.optim.ema import EmaSet
from sfumato.optim.groups import ParameterGroup
from sfumato.optim.half_scaler import make_scaler
from sfumato.optim.half_stepper import make_half_stepper
from sfumato.optim.lr_schedule import LrSchedule, make_lr_schedule
from sfumato.optim.optimizers import make_optimizer
from sfumato.parallel.base import ParallelStrategy
from sfumato.plan import RunPlan
from sfumato.training.block_setup import PreparedNetworks, make_fused_backward
from sfumato.training.run_state import WEIGHTS, RunState
from sfumato.training.start_point import StartPoint
from sfumato.training.state_parts import EmaState, OptimizerState, ScalerState, UncertaintyState, WeightsState
from sfumato.training.step_owner import StepAfterBackward, StepByEngine, StepInBackward, StepOwner

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OptimizerSetup:
    """What takes the steps."""

    optimizer: Optimizer
    lr_schedule: LrSchedule
    scaler: GradScaler  # does nothing but in fp16
    parameters: list[nn.Parameter]  # of the method
    uncertainty: Uncertainty | None  # learned weights of the loss
    ema: EmaSet
    owner: StepOwner

    @property
    def all_parameters(self) -> list[nn.Parameter]:
        """Everything that gets a gradient: the method's parameters, and the learned weights of the loss."""
        return [*self.parameters, *(self.uncertainty.parameters() if self.uncertainty else ())]


def set_up_optimizer(
    plan: RunPlan, networks: PreparedNetworks, start: StartPoint, state: RunState, parallel: ParallelStrategy
) -> OptimizerSetup:
    """Make everything and add it to the state; a resumed run goes on with what was saved."""
    config, groups = plan.config, networks.groups
    state.add(WEIGHTS, WeightsState(plan.method, parallel))
    uncertainty = make_uncertainty(config.loss, plan.seed, parallel.device)
    state.add("uncertainty", UncertaintyState(uncertainty))
    optimizer = make_optimizer(config.optim, [*groups, *uncertainty_groups(config, uncertainty)])
    lr_schedule = make_lr_schedule(config.optim, optimizer, plan.total_steps - start.schedule)
    memory = config.memory
    scaler = make_scaler(parallel.device, mixed=memory.mixed_precision == "fp16", full=memory.full_fp16)
    engine = parallel.start_engine(
        optimizer,
        plan.method.modules,
        accumulation=config.loop.gradient_accumulation_steps,
        max_grad_norm=config.optim.max_grad_norm,
    )
    state.add("optimizer", OptimizerState(optimizer, parallel) if engine is None else engine.state)
    state.add("lr_schedule", lr_schedule)
    state.add("scaler", ScalerState(scaler))
    parameters = [parameter for group in groups for parameter in group.parameters]
    if engine is not None:
        owner: StepOwner = StepByEngine(engine=engine, parallel=parallel)
    else:
        further = list(uncertainty.parameters()) if uncertainty else []
        owner = make_step_owner(plan, networks, parallel, optimizer, scaler, parameters=parameters, further=further)
    ema = EmaSet(config.ema, parameters)
    state.add("ema", EmaState(ema, parallel))
    return OptimizerSetup(
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        scaler=scaler,
        owner=owner,
        parameters=parameters,
        uncertainty=uncertainty,
        ema=ema,
    )


def make_step_owner(
    plan: RunPlan,
    networks: PreparedNetworks,
    parallel: ParallelStrategy,
    optimizer: Optimizer,
    scaler: GradScaler,
    *,
    parameters: Sequence[nn.Parameter],
    further: Sequence[nn.Parameter],
) -> StepOwner:
    """Of an optimizer that no engine steps. parameters, further: of the method, and others that it has."""
    optim = plan.config.optim
    stepper = make_half_stepper(plan.config.memory, optimizer, plan.seed, scaler)
    fused = make_fused_backward(optim, optimizer, networks, stepper)
    if fused is not None:
        return StepInBackward(optimizer=optimizer, scaler=scaler, fused=fused)
    return StepAfterBackward(
        optimizer=optimizer,
        scaler=scaler,
        stepper=stepper,
        parallel=parallel,
        parameters=parameters,
        further=further,
        max_grad_norm=optim.max_grad_norm,
    )


def uncertainty_groups(config: Config, uncertainty: Uncertainty | None) -> Iterator[ParameterGroup]:
    """It has its own learning rate and no weight decay."""
    if uncertainty:
        learning_rate, parameters = config.loss.uncertainty_lr, list(uncertainty.parameters())
        yield ParameterGroup(name=UNCERTAINTY_GROUP, parameters=parameters, learning_rate=learning_rate, decays=False)
