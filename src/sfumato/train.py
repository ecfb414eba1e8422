"""READ FIRST. train() > loop() > train_step(): the only training loop, for every family and method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.config import Config
from sfumato.data.loader import Step
from sfumato.loss import SampleLosses, training_loss
from sfumato.optim.lr_schedule import current_learning_rates
from sfumato.parallel.start import start_parallel
from sfumato.training.diagnose import diagnose_nonfinite
from sfumato.training.interrupt import interruptible
from sfumato.training.latents import load_latents
from sfumato.training.previews import save_previews
from sfumato.training.rescue import StateRescue
from sfumato.training.run import Run
from sfumato.training.saving import check_saves, run_due_saves, save_final, save_stopped, state_folder
from sfumato.training.setup_run import build_run
from sfumato.training.validation import run_due_validation


def train(config: Config) -> None:
    """Train as the configuration says. Ends early, with a state to resume from, when the user interrupts."""
    with start_parallel(config.processes.ddp_timeout) as parallel:
        run = build_run(config, parallel)
        if run is None:
            return
        with interruptible(parallel), run.output_lock, run.hub, run.metrics, StateRescue(run):
            if run.config.samples.sample_at_first and not run.state.resumed:
                save_previews(run, run.step, f"{run.step:06d}")
            run_due_validation(run, run.step if run.state.resumed else 0)
            loop(run)
        check_saves(run)


def loop(run: Run) -> None:
    """Step after step; once in a while: log, validate, make previews, save."""
    total = run.plan.total_steps
    for step in run.loader.steps(run.start.step):
        result = train_step(run, step)
        number = step.index + 1
        curves = {"grad_norm": result.grad_norm, **run.method.after_step()}
        run.ema.update()
        run.complete_step(number)
        run.metrics.log_step(number, result.loss, current_learning_rates(run.optimizer), curves, result.samples)
        if number == run.start.step + 1:
            run.warn(run.method.report())
        if run.nonfinite_guard.exhausted:
            raise run.nonfinite_guard.error(state_folder(run, number))
        run_due_validation(run, number)
        if number == total:
            break
        run_due_saves(run, number)
        if run.parallel.must_stop:
            save_stopped(run, number)
            return
    save_final(run)


class StepResult(NamedTuple):
    """What a step reports; nothing waits for the device."""

    loss: Tensor  # 0-d, summed over all processes
    grad_norm: Tensor  # 0-d, of all gradients before they are clipped
    samples: list[SampleLosses]  # of this process, one for each micro-batch


def train_step(run: Run, step: Step) -> StepResult:
    """One optimizer step over its micro-batches; nothing that is not finite reaches the weights."""
    run.method.before_step(step.index)
    run.optimizer.zero_grad(set_to_none=True)
    total_loss = torch.zeros((), device=run.device)
    samples: list[SampleLosses] = []
    for micro_step, batch in enumerate(step.batches):
        run.context.randomness.seed_modules(step.index, micro_step, run.parallel.rank)
        with run.autocast():
            loss = training_loss(run.context, batch, load_latents(run, batch), step.real_samples, samples)
        run.scaler.scale(loss).backward()
        total_loss += loss.detach()
    run.parallel.read_facts(run.parallel.reduce(run.all_parameters, total_loss))
    run.scaler.unscale_(run.optimizer)
    grad_norm = run.parallel.total_norm(run.parameters)
    run.optimization.lr_schedule.set(run.optimizer, step.index - run.start.schedule)
    if run.nonfinite_guard.allows(total_loss, grad_norm, scale=run.scaler.get_scale()):
        if run.config.optim.max_grad_norm > 0:
            run.parallel.clip(run.parameters, run.config.optim.max_grad_norm, grad_norm)
        run.take_optimizer_step(step.index)
        if not run.training_check.complete and bool(torch.isfinite(grad_norm)):
            run.training_check.check_step()
    else:
        run.nonfinite_guard.report_skip(step.index + 1, diagnose_nonfinite(run, step))
    run.scaler.update()
    return StepResult(total_loss, grad_norm, samples)
