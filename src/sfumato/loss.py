"""The loss of a batch, for training, validation and diagnosis alike: noise it, predict, compare."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.data.batch import Batch, RandomDraws, Tensors
from sfumato.diffusion.objective import per_sample
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import Recipe
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders, encode_with_grad
from sfumato.sampling.denoise import Predictor


class Goal(Protocol):
    """What a sample's input is, and what the prediction is compared with; noised images where a run has no other."""

    def draw(self, context: LossContext, batch: Batch, x0: Tensor) -> RandomDraws:
        """Timesteps and noise, a function of the samples' ids; on the CPU."""
        ...

    def measure(
        self, context: LossContext, batch: Batch, x0: Tensor, t: Tensor, noise: Tensor, input_noise: Tensor
    ) -> Tensor:
        """(B,) the loss of each sample before weighting."""
        ...


class LossMethod(Predictor, Protocol):
    """What a loss needs of a training method, or of the adapters in its place."""

    def disabled(self) -> AbstractContextManager[None]:
        """A context with the model as it was before training."""
        ...


@dataclass(frozen=True, kw_only=True)
class LossContext:
    """All that a loss depends on besides the batch."""

    model: Family
    method: LossMethod
    recipe: Recipe
    randomness: Randomness
    text: FrozenTextEncoders  # features of encoders that do not train and are not cached
    device: torch.device
    mixed_dtype: torch.dtype = torch.float32  # of --mixed_precision
    goal: Goal | None = None  # None: noised images


class SampleLosses(NamedTuple):
    """A micro-batch's samples, for reports; on the device, nothing waits for them."""

    t: Tensor  # (B,) in 0 .. 1000
    loss: Tensor  # (B,) before weighting; nan for padding samples


def training_loss(
    context: LossContext, batch: Batch, x0: Tensor, real_samples: int, log: list[SampleLosses] | None = None
) -> Tensor:
    """A micro-batch's share of the step's loss: the sum over its samples / the real samples of the whole step.

    Latents x0 (B, C, h, w); t in 0 .. 1000; everything random is a function of the samples' ids.
    log: receives each sample's t and loss.
    """
    model, recipe = context.model, context.recipe
    draw, measure = (context.goal.draw, context.goal.measure) if context.goal else (draw_noise, sample_losses)
    draws = batch.draws or draw(context, batch, x0)
    t, noise = draws.t, draws.noise.to(x0, non_blocking=True)
    input_noise = noise if draws.input_noise is None else draws.input_noise.to(x0, non_blocking=True)
    loss = measure(context, batch, x0, t, noise, input_noise)
    weight = batch.weight.to(x0, non_blocking=True)
    if log is not None:
        log.append(SampleLosses(t, loss.detach().where(weight > 0, torch.nan)))
    level = model.objective.level(t)
    weight = recipe.weighting(level, model.objective).to(loss, non_blocking=True) * weight
    if recipe.uncertainty:
        loss = recipe.uncertainty(loss, level)
    return (loss * weight).sum() / real_samples


def draw_noise(context: LossContext, batch: Batch, x0: Tensor) -> RandomDraws:
    """Timesteps and noise on the CPU for latents x0 (B, C, h, w); only the input's noise is perturbed."""
    recipe, rng, ids = context.recipe, context.randomness, batch.ids
    t = recipe.timesteps(rng, ids, x0.shape[1:], context.model.latents, batch.timestep_offset)
    noise = rng.per_sample("noise", ids, lambda draw, i: recipe.noise(draw, x0[i]))
    perturb = recipe.perturb
    if perturb is None:
        return RandomDraws(t=t, noise=noise)
    return RandomDraws(
        t=t, noise=noise, input_noise=rng.per_sample("perturb", ids, lambda draw, i: perturb(draw, noise[i]))
    )


def sample_losses(
    context: LossContext, batch: Batch, x0: Tensor, t: Tensor, noise: Tensor, input_noise: Tensor
) -> Tensor:
    """(B,) the loss of each sample before weighting.

    Latents x0 (B, C, h, w); t (B,) in 0 .. 1000; noise as the target has it and as the input has it.
    """
    model, method, recipe = context.model, context.method, context.recipe
    level = model.objective.level(t)
    noisy = model.objective.add_noise(x0, input_noise, level)
    method.set_batch(model, batch.extras)  # lasts until the next one
    reference = reference_estimate(context, batch, noisy, t)
    conditioning = make_conditioning(context, batch)
    prediction = method.predict(model, noisy, t, conditioning, batch.extras).to(x0.dtype)

    estimate = model.objective.estimate(prediction, noisy, level)
    target = model.objective.target(x0, noise, level)
    if reference is not None and batch.preserve is not None:
        target = torch.where(per_sample(batch.preserve, x0) > 0, reference, target)
    loss = recipe.loss(estimate, target, level)
    if batch.mask is not None:
        mask = batch.mask.to(loss, non_blocking=True)
        loss = loss * mask  # multiplied, not divided by the mask's sum
        if recipe.outside_mask and reference is not None:
            loss = loss + recipe.outside_mask * (1 - mask) * recipe.loss(estimate, reference, level)
    return loss.flatten(1).mean(1)


def reference_estimate(context: LossContext, batch: Batch, noisy: Tensor, t: Tensor) -> Tensor | None:
    """The estimate of the reference model, i.e. the model before training, for the samples that need it.

    (B, C, h, w), zeros for the other samples; None where no sample needs it. It is computed before the main forward,
    since whatever a hook reads there has to stay as it is until backward is over.
    """
    rows = needs_reference(batch, context.recipe).nonzero().flatten()
    if not len(rows):
        return None
    model, method = context.model, context.method
    places = rows.to(noisy.device, non_blocking=True)
    part, part_noisy, part_t = batch.take(rows), noisy[places], t[rows]
    with torch.no_grad(), method.disabled():  # text encoders that train are those of before training, too
        conditioning = make_conditioning(context, part)
        prediction = method.predict(model, part_noisy, part_t, conditioning, part.extras).to(noisy.dtype)
    estimate = torch.zeros_like(noisy)
    estimate[places] = model.objective.estimate(prediction, part_noisy, model.objective.level(part_t))
    return estimate


def needs_reference(batch: Batch, recipe: Recipe) -> Tensor:
    """(B,) bool: whether a sample's loss asks for the reference model's estimate."""
    needed = torch.zeros_like(batch.weight, dtype=torch.bool) if batch.preserve is None else batch.preserve
    if recipe.outside_mask and batch.mask is not None:
        needed = needed | (batch.mask < 1).flatten(1).any(1)
    return needed & (batch.weight > 0)


def make_conditioning(context: LossContext, batch: Batch) -> Tensors:
    """The denoiser's text arguments: cached features, live ones of encoders that train, remembered ones of the rest."""
    model, method = context.model, context.method
    features: dict[str, Tensors] = {part: dict(tensors) for part, tensors in batch.text.items()}
    captions: Sequence[str] = [method.rewrite_caption(caption) for caption in batch.captions]
    for part in model.text_parts:
        if part in method.live_text:
            features[part] = encode_with_grad(model, part, captions, weighted=context.text.weighted)
        elif part not in features:
            features[part] = context.text.encode(part, captions)
    on_device: dict[str, Tensors] = {}
    for part, tensors in features.items():
        on_device[part] = {name: tensor.to(context.device, non_blocking=True) for name, tensor in tensors.items()}
    for part, dropped in batch.text_dropped.items():
        on_device[part] = model.drop_text(part, on_device[part], dropped.to(context.device, non_blocking=True))
    return model.condition(on_device, batch.sizes, context.recipe.guidance)
