"""READ FIRST. train() > loop() > train_step(): the only training loop, for every family and method."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from sfumato.config import Config
from sfumato.data.loader import Step
from sfumato.loss import SampleLosses
from sfumato.parallel.start import start_parallel
from sfumato.training.follow import follow_step, settle
from sfumato.training.interrupt import interruptible
from sfumato.training.micro_batch import compute_loss
from sfumato.training.outcomes import StepResult
from sfumato.training.prefetch import prefetch
from sfumato.training.previews import save_previews
from sfumato.training.rescue import StateRescue
from sfumato.training.run import Run
from sfumato.training.saving import check_saves, run_due_saves, save_final, save_stopped
from sfumato.training.setup_run import build_run
from sfumato.training.validation import run_due_validation


def train(config: Config) -> Path | None:
    """Train as the configuration says; gives what is saved at the end, a file or a folder.

    Ends early, with a state to resume from, when the user interrupts; None then, and where no step is left.
    """
    with start_parallel(config.processes, mixed_precision=config.memory.mixed_precision) as parallel:
        run = build_run(config, parallel)
        if run is None:
            return None
        rescue, learning = StateRescue(run), parallel.learning_of_failures()
        with interruptible(parallel), run.output_lock, run.hub, run.metrics, rescue, learning:
            if run.config.samples.sample_at_first and not run.state.resumed:
                save_previews(run, run.step, f"{run.step:06d}")
            run_due_validation(run, run.step if run.state.resumed else 0)
            loop(run)
        check_saves(run)
        return run.output_path(run.plan.saves.name) if run.step == run.plan.total_steps else None


def loop(run: Run) -> None:
    """Step after step; once in a while: log, validate, make previews, save."""
    total = run.plan.total_steps
    for step in prefetch(run, run.start.step):
        result = train_step(run, step)
        number = step.index + 1
        curves = run.method.after_step()
        run.ema.update()
        run.complete_step(number)
        if number == run.start.step + 1 and run.optimization.owner.keeps_gradients:
            run.warn(run.method.report())
        follow_step(run, step, result, curves)
        run_due_validation(run, number)
        if number == total:
            break
        run_due_saves(run, number)
        if run.parallel.must_stop:
            settle(run)
            save_stopped(run, number)
            return
    settle(run)
    save_final(run)


def train_step(run: Run, step: Step) -> StepResult:
    """One optimizer step over its micro-batches; nothing that is not finite reaches the weights.

    It launches what the device is to do and does not wait for it.
    """
    run.method.before_step(step.index)
    run.optimization.owner.forget_gradients()
    run.optimization.lr_schedule.set(run.optimizer, step.index - run.start.schedule)
    total_loss = torch.zeros((), device=run.device)
    samples: list[SampleLosses] = []
    for micro_step, batch in enumerate(step.batches):
        run.context.randomness.seed_modules(step.index, micro_step, run.parallel.rank)
        loss = run.forward(partial(compute_loss, run, batch, step.real_samples, samples))
        total_loss += loss.detach()
        run.optimization.owner.backward(loss, step.index, total_loss, is_last=micro_step + 1 == len(step.batches))
    grad_norm, verdict = run.optimization.owner.finish(step.index, total_loss)
    measured = run.parallel.join_findings(run.outcomes.check.measure())
    return StepResult(total_loss, grad_norm, samples, verdict, measured)
