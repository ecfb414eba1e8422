"""The validation loss: the held-out images with the same times and noise at every validation of a run.

Every image is used at a few timesteps that divide the trained range into equal parts, each with its own noise, which
is a function of the validation seed and the image's index among the held-out ones. So two validations differ by the
weights alone, and far less than training losses, whose timesteps and noise change at each step.

The loss is that of each sample before weighting, as in "loss by noise level": --min_snr_gamma and the like say what
training should attend to, not how well the model does, and with them runs could not be compared. For the same reason
no difference to the training loss is shown, which is weighted and has other timesteps. The input is not perturbed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sfumato.config import Config
from sfumato.config.evaluation import VALIDATION_LEVELS
from sfumato.data.batch import Batch
from sfumato.data.batch_sampler import ValidationSampler
from sfumato.data.loader import Loader
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.timesteps import timestep_quantiles
from sfumato.loss import LossContext, sample_losses
from sfumato.training.evaluation import eval_mode
from sfumato.training.latents import LatentSource, check_latents, load_latents, load_other_images
from sfumato.training.memory_shortage import give_up_where_short, run_within_memory
from sfumato.training.run import Run
from sfumato.training.saving import ema_metadata, save_output_of

log = logging.getLogger(__name__)
_T = TypeVar("_T")
SERIES = "loss/validation/"  # as sd-scripts names its curves
VALIDATION = "validation"


class LossSource(LatentSource, Protocol):
    """What losses are measured with: a run, or a checkpoint without one."""

    @property
    def context(self) -> LossContext: ...

    def forward(self, compute: Callable[[], _T]) -> _T:
        """Call what runs the networks, in mixed precision."""
        ...


def run_due_validation(run: Run, step: int) -> None:
    """Before the first step, once in a while, and after the last: measure, report, and keep the best model so far.

    A run that stops does without; when it is resumed it makes up for that.
    """
    if run.validation_loader is None or not is_due(run, step) or run.best.validated == step:
        return
    if run.parallel.must_stop or VALIDATION in run.given_up:
        return
    times = list_validation_times(run.config)
    reset_best_if_changed(run, times)
    with eval_mode(run):
        by_level = measure_validation_loss(run, times)
        if by_level is None:
            return
        run.best.validated = step
        loss = sum(by_level) / len(by_level)
        report_validation_loss(run, step, loss, dict(zip(times, by_level, strict=True)))
        if step == 0:
            run.best.before = loss
        elif run.best.is_beaten_by(loss) and save_best(run, step, loss):
            run.best.loss, run.best.step = loss, step
    run.metrics.publish()
    if step == run.plan.total_steps and str(run.best):
        log.info("%s", run.best)


def is_due(run: Run, step: int) -> bool:
    """After this step, counted from 1; 0 is before the first."""
    options = run.config.validation
    by_steps, by_epochs = options.validate_every_n_steps, options.every_n_epochs
    if step in (0, run.plan.total_steps) or (by_steps is not None and step % by_steps == 0):
        return True
    return by_epochs is not None and step % (by_epochs * run.plan.steps_per_epoch) == 0


def reset_best_if_changed(run: Run, times: list[int]) -> None:
    """Losses of other images or timesteps, before a run was resumed, cannot be compared."""
    sampler, before = validation_sampler(run), run.best.conditions
    now = f"{sampler.num_samples} of {sampler.num_ids} images at t {', '.join(map(str, times))}, seed {sampler.seed}"
    if before not in ("", now):
        log.warning("validation was with %s, now it is with %s; the best so far no longer counts", before, now)
        run.best.reset(now)
    run.best.conditions = now


def validation_sampler(run: Run) -> ValidationSampler:
    assert run.validation_loader is not None
    assert isinstance(run.validation_loader.sampler, ValidationSampler)
    return run.validation_loader.sampler


@torch.no_grad()  # not in inference mode: remembered text features serve training, too
def measure_validation_loss(run: Run, times: list[int]) -> list[float] | None:
    """The mean loss at each time, the same for any number of processes: each puts its samples into one table.

    None where one of them was asked to stop meanwhile, or has too little memory.
    """
    sampler = validation_sampler(run)
    table = torch.zeros(sampler.num_ids, len(times), device=run.device)
    shortage = run_within_memory(partial(fill_validation_table, run, times, table), run.parallel)
    if give_up_where_short(run, VALIDATION, shortage):
        return None
    if run.parallel.must_stop:
        log.info("the validation was cut short, since the run stops")
        return None
    run.parallel.sum(table)
    return (table.cpu().double().sum(0) / sampler.num_samples).tolist()  # one wait for all


def fill_validation_table(run: Run, times: list[int], table: Tensor) -> None:
    """The loss of each image of this process at each time; ends early when the run is to stop."""
    loader, sampler = run.validation_loader, validation_sampler(run)
    assert loader is not None
    for step in loader.steps():
        if run.parallel.may_break_off():
            return
        fill_validation_rows(run, loader, step.batches[0], times, table, seed=sampler.seed)


def list_validation_times(config: Config) -> list[int]:
    """The times at which the loss of every held-out image is measured."""
    return timestep_quantiles(config.noise, VALIDATION_LEVELS)


def fill_validation_rows(
    source: LossSource, loader: Loader, batch: Batch, times: Sequence[int], table: Tensor, *, seed: int
) -> None:
    """The losses of one batch of held-out images. seed: of the validation."""
    randomness, recipe, goal = Randomness(seed), source.context.recipe, source.context.goal
    measure = sample_losses if goal is None else goal.measure
    batch = load_other_images(source, batch)
    x0, positions = load_latents(source, batch), batch.weight.nonzero().flatten()
    if batch.latents is None:  # those of the cache were checked when they were made
        check_latents(x0, batch, loader)
    real, rows = (index.to(source.device, non_blocking=True) for index in (positions, batch.ids[positions]))
    for column, t in enumerate(times):
        noise = randomness.per_sample(
            f"validation noise {column}", batch.ids, lambda draw, i: recipe.noise(draw, x0[i])
        ).to(x0, non_blocking=True)
        every_t = torch.full((len(x0),), float(t))
        losses = source.forward(partial(measure, source.context, batch, x0, every_t, noise, noise))
        table[rows, column] = losses[real].to(table)


def report_validation_loss(run: Run, step: int, loss: float, by_level: dict[int, float]) -> None:
    """One line, and the curves."""
    values = {f"{SERIES}step_average": loss, **{f"{SERIES}t{t}": value for t, value in by_level.items()}}
    if step and step % run.plan.steps_per_epoch == 0:
        values[f"{SERIES}epoch_average"] = loss
    run.metrics.log_values(step, values)
    levels = "  ".join(f"t {t}: {value:.4f}" for t, value in by_level.items())
    when = f"after step {step}" if step else "before training"
    log.info("validation %s: loss %.4f  (%s)", when, loss, levels)
    if not math.isfinite(loss):
        log.warning("the validation loss after step %d is not finite", step)


def save_best(run: Run, step: int, loss: float) -> bool:
    """Replace the best model before with this one; False where that failed, so that the older one counts."""
    if not run.config.validation.save_best:
        return True
    name = f"{run.plan.saves.name}-best"
    for path in run.output_paths(name):
        run.hub.finish(path)
    facts = ema_metadata(run, run.ema.eval_ema)
    failures = save_output_of(run, name, step, {"ss_validation_loss": f"{loss:.6g}", **facts})
    run.failed_saves += failures
    return not failures
