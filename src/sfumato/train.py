"""READ FIRST. train() > train_step() > training_loss(): the only training loop, for every family and method."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.data.batch import Batch, Tensors
from sfumato.data.loader import Step
from sfumato.diffusion.objective import per_sample
from sfumato.diffusion.recipe import Recipe
from sfumato.families.encoding import live_text
from sfumato.optim.rates import shown_rates
from sfumato.track.journal import Samples
from sfumato.training.diagnose import explain
from sfumato.training.interrupt import Interrupt, interruptible
from sfumato.training.run import Run
from sfumato.training.saving import save_final, save_previews, save_state_folder, saves_due
from sfumato.training.setup_run import open_run
from sfumato.training.validation import validation_due

log = logging.getLogger(__name__)
MESSAGE = 1 << 26  # gradients that processes add up at a time


def train(config: Config) -> None:
    """Train as the configuration says. Ends early, with a state to resume from, when the user interrupts."""
    run = open_run(config)
    if run is None:
        return
    with interruptible() as interrupt, run.hub, run.journal:
        if config.save.resume is None:
            if config.samples.sample_at_first:
                save_previews(run, run.start, f"{run.start:06d}")
            validation_due(run, 0, sample_losses)
        loop(run, interrupt)


def loop(run: Run, interrupt: Interrupt) -> None:
    """Step after step; once in a while: log, validate, make previews, save."""
    for step in run.loader.steps(run.start):
        taken = train_step(run, step)
        done = step.index + 1
        curves = {"grad_norm": taken.norm, **run.method.after_step()}
        run.averages.update()
        run.journal.note(done, taken.loss, shown_rates(run.optimizer), curves, taken.samples)
        if done == run.start + 1:
            run.warn(run.method.report())
        if run.health.lost:
            raise run.health.error(save_state_folder(run, f"{run.saves.name}-step{done:08d}-state", done))
        validation_due(run, done, sample_losses)
        if done == run.total:
            break
        saves_due(run, done)
        if interrupt.asked:
            folder = save_state_folder(run, f"{run.saves.name}-step{done:08d}-state", done)
            run.hub.upload_state(folder, last=True)
            log.info("stopped after step %d of %d; go on with: --resume %s", done, run.total, folder)
            return
    save_final(run)


class Taken(NamedTuple):
    """What a step tells of itself; 0-d, on the device."""

    loss: Tensor  # summed over all processes
    norm: Tensor  # of all gradients, before they are clipped
    samples: Samples  # of this process


def train_step(run: Run, step: Step) -> Taken:
    """One optimizer step over its micro-batches; nothing that is not finite reaches the weights."""
    run.method.before_step(step.index)
    run.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.device)
    samples: list[tuple[Tensor, Tensor]] = []
    for micro, batch in enumerate(step.batches):
        run.randomness.seed_modules(step.index, micro, run.processes.process_index)
        with run.autocast():
            loss = training_loss(run, batch, step.real_samples, samples)
        run.scaler.scale(loss).backward()
        total += loss.detach()
    sum_over_processes(run, total)
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in run.parameters if p.grad is not None])
    run.rates.set(run.optimizer, step.index - run.begun.schedule)
    if run.health.allows(total, norm, scale=run.scaler.get_scale()):
        if run.config.optim.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(run.parameters, run.config.optim.max_grad_norm, norm)
        run.take_step(step.index)
        if not run.proof.done and bool(torch.isfinite(norm)):
            run.proof.look()
    else:
        run.health.tell(step.index + 1, explain(run, step, training_loss))
    run.scaler.update()
    return Taken(total, norm, samples)


def training_loss(
    run: Run, batch: Batch, real_samples: int, samples: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """A micro-batch's share of the step's loss: the sum over its samples / the real samples of the whole step.

    Latents (B, C, h, w); t in 0 .. 1000; everything random is a function of the samples' ids.
    samples: takes in t and the loss of each sample before weighting, nan for fillers; nothing waits for them.
    """
    model, recipe, rng = run.model, run.recipe, run.randomness
    x0 = run.latents(batch)
    t = recipe.timesteps(rng, batch.ids, x0.shape[1:], model.latents)
    noise = rng.per_sample("noise", batch.ids, lambda draw, i: recipe.noise(draw, x0[i]))
    seen = noise
    if recipe.perturb:  # only the input is perturbed, the target keeps the clean noise
        perturb = recipe.perturb
        seen = rng.per_sample("perturb", batch.ids, lambda draw, i: perturb(draw, noise[i])).to(x0)
    loss, weight = sample_losses(run, batch, x0, t, noise.to(x0), seen.to(x0)), batch.weight.to(x0)
    if samples is not None:
        samples.append((t, loss.detach().where(weight > 0, torch.nan)))
    level = model.objective.level(t)
    weight = recipe.weighting(level, model.objective).to(loss) * weight
    if recipe.uncertainty:
        loss = recipe.uncertainty(loss, level)
    return (loss * weight).sum() / real_samples


def sample_losses(run: Run, batch: Batch, x0: Tensor, t: Tensor, noise: Tensor, seen: Tensor) -> Tensor:
    """(B,) the loss of each sample before weighting, of training and of validation alike.

    Latents x0 (B, C, h, w); t (B,) in 0 .. 1000; noise as the target has it and as the input does.
    """
    model, method, recipe = run.model, run.method, run.recipe
    level = model.objective.level(t)
    noisy = model.objective.add_noise(x0, seen, level)
    method.begin(model, batch.extras)  # lasts until the next begin
    untrained = untrained_estimate(run, batch, noisy, t)
    prediction = method.predict(model, noisy, t, conditioning_of(run, batch), batch.extras).to(x0.dtype)

    estimate = model.objective.estimate(prediction, noisy, level)
    target = model.objective.target(x0, noise, level)
    if untrained is not None and batch.preserve is not None:
        target = torch.where(per_sample(batch.preserve, x0) > 0, untrained, target)
    loss = recipe.loss(estimate, target, level)
    if batch.mask is not None:
        mask = batch.mask.to(loss)
        loss = loss * mask  # multiplied, not divided by the mask's sum
        if recipe.outside_mask and untrained is not None:
            loss = loss + recipe.outside_mask * (1 - mask) * recipe.loss(estimate, untrained, level)
    return loss.flatten(1).mean(1)


def untrained_estimate(run: Run, batch: Batch, noisy: Tensor, t: Tensor) -> Tensor | None:
    """What the model before training makes of the same noisy latents, text and t, for the samples that need it.

    (B, C, h, w), zeros for the other samples; None where there are no such. It comes before the main forward, since
    whatever a hook reads there has to stay as it is until backward is over.
    """
    places = held(batch, run.recipe).nonzero().flatten()
    if not len(places):
        return None
    some, seen, times = batch.take(places), noisy[places], t[places]
    with torch.no_grad(), run.method.without():  # text encoders that train are read as they were, too
        prediction = run.method.predict(run.model, seen, times, conditioning_of(run, some), some.extras).to(noisy.dtype)
    estimate = torch.zeros_like(noisy)
    estimate[places] = run.model.objective.estimate(prediction, seen, run.model.objective.level(times))
    return estimate


def held(batch: Batch, recipe: Recipe) -> Tensor:
    """(B,) bool: whether a sample's loss asks for what the model before training says."""
    found = torch.zeros_like(batch.weight, dtype=torch.bool) if batch.preserve is None else batch.preserve
    if recipe.outside_mask and batch.mask is not None:
        found = found | (batch.mask < 1).flatten(1).any(1)
    return found & (batch.weight > 0)


def conditioning_of(run: Run, batch: Batch) -> Tensors:
    """Cached features, live ones of encoders that train, and remembered ones of those that do not."""
    features: dict[str, Tensors] = {part: dict(tensors) for part, tensors in batch.text.items()}
    captions = [run.method.caption(caption) for caption in batch.captions]
    for part in run.model.text_parts:
        if part in run.method.live_text:
            features[part] = live_text(run.model, part, captions, weighted=run.frozen_text.weighted)
        elif part not in features:
            features[part] = run.frozen_text.encode(part, captions)
    moved = {part: {k: v.to(run.device) for k, v in tensors.items()} for part, tensors in features.items()}
    for part, dropped in batch.text_dropped.items():
        moved[part] = run.model.dropped_text(part, moved[part], dropped.to(run.device))
    return run.model.condition(moved, batch.sizes, run.recipe.guidance)


def sum_over_processes(run: Run, loss: Tensor) -> None:
    """Add up gradients in few flat messages; each process divided by the real samples of all, so a sum is right.

    A parameter that got a gradient in no process keeps none, so that the optimizer passes over it as it does alone.
    """
    if run.processes.num_processes == 1:
        return
    parameters = run.learning
    here = [p.grad is not None for p in parameters]
    wide = torch.promote_types(parameters[0].dtype, torch.float32)  # in which sums are made
    facts = torch.cat([loss.flatten(), loss.new_tensor(here)]).to(wide)
    summed = facts
    for bucket in buckets(parameters):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([facts, *(gradient.flatten() for gradient in gradients)])
        distributed.all_reduce(flat)
        summed, *pieces = flat.split([len(facts), *(gradient.numel() for gradient in gradients)])
        for parameter, piece in zip(bucket, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
    loss.copy_(summed[0])
    for parameter, counts in zip(parameters, here if all(here) else summed[1:].tolist(), strict=True):
        parameter.grad = parameter.grad if counts else None


def buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in turn, as many as make one message: what it takes in memory for a while."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > MESSAGE:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    yield bucket
