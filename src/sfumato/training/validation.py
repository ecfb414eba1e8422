"""The validation loss: the held-out images with the same times and noise at every validation of a run.

Every image is seen at a few times that cut the trained range into equal parts, each time with noise of its own, which
is a function of the validation seed and the image's place among the held-out ones. So two validations differ by the
weights alone, and their numbers by far less than those of training, where times and noise are drawn anew at each step.

The loss is that of each sample before weighting, as in "loss by noise level": --min_snr_gamma and the like say what
training should attend to, not how well the model does, and with them runs could not be compared. For the same reason
nothing is subtracted from the training loss, which is weighted and taken at other times. The input is not perturbed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
import torch.distributed as distributed
from torch import Tensor

from sfumato.config.validation import LEVELS
from sfumato.data.batch import Batch
from sfumato.data.order import HeldOut
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.timesteps import quantiles
from sfumato.track.best import Best
from sfumato.training.run import Run
from sfumato.training.saving import at_rest, average_facts, kept_going, output_path, save_output

log = logging.getLogger(__name__)
SERIES = "loss/validation/"  # the field's names for its curves begin with it
Losses = Callable[[Run, Batch, Tensor, Tensor, Tensor, Tensor], Tensor]  # as train.sample_losses


def validation_due(run: Run, step: int, losses: Losses) -> None:
    """Before the first step, once in a while, and after the last: measure, tell, and keep the best model so far."""
    if run.held_out is None or not is_due(run, step):
        return
    times = quantiles(run.config.noise, LEVELS)
    start_anew_if_changed(run, times)
    with at_rest(run):
        by_level = measure(run, times, losses)
        loss = sum(by_level) / len(by_level)
        tell(run, step, loss, dict(zip(times, by_level, strict=True)))
        if step == 0:
            run.best.before = loss
        elif run.best.beaten_by(loss) and save_best(run, step, loss):
            run.best.loss, run.best.step = loss, step
    run.journal.publish()
    if step == run.total and str(run.best):
        log.info("%s", run.best)


def is_due(run: Run, step: int) -> bool:
    """After this step, counted from 1; 0 is before the first."""
    options = run.config.validation
    by_steps, by_epochs = options.validate_every_n_steps, options.every_n_epochs
    if step in (0, run.total) or (by_steps is not None and step % by_steps == 0):
        return True
    return by_epochs is not None and step % (by_epochs * run.steps_per_epoch) == 0


def start_anew_if_changed(run: Run, times: list[int]) -> None:
    """A resumed run that validates in another way cannot compare its losses with those before."""
    order, before = order_of(run), run.best.asked
    now = f"{order.samples} of {order.ids} images at t {', '.join(map(str, times))}, seed {order.seed}"
    if before not in ("", now):
        log.warning("validation was with %s, now it is with %s; the best so far no longer counts", before, now)
        run.best = Best()
    run.best.asked = now


def order_of(run: Run) -> HeldOut:
    assert run.held_out is not None
    assert isinstance(run.held_out.order, HeldOut)
    return run.held_out.order


@torch.no_grad()  # not in inference mode: what is remembered of the text serves training, too
def measure(run: Run, times: list[int], losses: Losses) -> list[float]:
    """The mean loss at each time, the same for any number of processes: each puts its samples into one table."""
    held_out, order = run.held_out, order_of(run)
    assert held_out is not None
    randomness = Randomness(order.seed)
    table = torch.zeros(order.ids, len(times), device=run.device)
    for step in held_out.steps():
        (batch,) = step.batches
        x0, real = run.latents(batch, held_out), batch.weight > 0
        for column, t in enumerate(times):
            noise = randomness.per_sample(
                f"validation noise {column}", batch.ids, lambda draw, i, x0=x0: run.recipe.noise(draw, x0[i])
            ).to(x0)
            with run.autocast():
                found = losses(run, batch, x0, torch.full((len(x0),), float(t)), noise, noise)
            table[batch.ids[real].to(run.device), column] = found[real.to(run.device)].to(table)
    if run.processes.num_processes > 1:
        distributed.all_reduce(table)
    return (table.cpu().double().sum(0) / order.samples).tolist()


def tell(run: Run, step: int, loss: float, by_level: dict[int, float]) -> None:
    """One line, and the curves."""
    values = {f"{SERIES}step_average": loss, **{f"{SERIES}t{t}": value for t, value in by_level.items()}}
    if step and step % run.steps_per_epoch == 0:
        values[f"{SERIES}epoch_average"] = loss
    run.journal.add(step, values)
    levels = "  ".join(f"t {t}: {value:.4f}" for t, value in by_level.items())
    when = f"after step {step}" if step else "before training"
    log.info("validation %s: loss %.4f  (%s)", when, loss, levels)
    if not math.isfinite(loss):
        log.warning("the validation loss after step %d is not finite", step)


def save_best(run: Run, step: int, loss: float) -> bool:
    """Put this model in the place of the best one before; False where that failed, so that the older one counts."""
    if not run.config.validation.save_best or not run.is_main:
        return True
    path, lost = output_path(run, f"{run.saves.name}-best"), len(run.lost)
    run.hub.finish(path)
    with kept_going(run, path, step):
        facts = average_facts(run, run.averages.evaluated)
        save_output(run, path, step, {"ss_validation_loss": f"{loss:.6g}", **facts})
        run.hub.upload(path)
    return len(run.lost) == lost
