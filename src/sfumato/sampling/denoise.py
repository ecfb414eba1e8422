"""The denoising loop, over Family.predict with diffusers' schedulers."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from sfumato.data.batch import Extras, Tensors, select_active
from sfumato.diffusion.objective import Objective
from sfumato.families.attention_couple import couple_parts
from sfumato.families.base import Family
from sfumato.sampling.growth import Growth
from sfumato.sampling.start import Start, keep_outside, skip_timesteps, start_from


class Predictor(Protocol):
    """What generating an image needs of a training method, or of the adapters in its place."""

    live_text: frozenset[str]  # encoders that train, whose output is never remembered

    def rewrite_caption(self, text: str) -> str: ...

    def set_batch(self, model: Family, extras: Extras) -> None: ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the images with a prompt and adapters of its own."""

    text: Tensors  # the denoiser's arguments for its prompts
    guidance: Guidance
    multipliers: Tensor | None  # (B, N) strengths of the adapters in it; None: there are none
    weight: Tensor  # (1, 1, h, w), its share of each place; those of all regions sum up to 1


@dataclass(frozen=True, kw_only=True)
class DenoiseRequest:
    """A batch of noise to turn into latents, and what its denoising depends on besides model and guidance."""

    noise: Tensor  # standard normal (B, C, h, w)
    text: Tensors  # the denoiser's arguments for the prompts; of regions each has its own
    scheduler: Any  # of diffusers; its timesteps are set here
    steps: int
    generators: Generator | list[Generator]  # of the noise that some schedulers add: one for all samples, or one each
    extras: Extras = field(default_factory=Extras)  # further images, by role
    flow_shift: float | None = None  # of the time grid, where the objective has such a shift
    start: Start | None = None  # an image to start from
    regions: Sequence[Region] = ()  # in place of the text and the guidance
    growth: Growth | None = None  # how latents that start small grow


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6)."""

    negative: Tensors | None = None  # the denoiser's arguments for the negative prompts; None: no guidance
    scale: float = 1.0
    empty: Tensors | None = None  # the same for the empty prompt, where the negative one has a scale of its own
    negative_scale: float = 0.0
    truncation: float = 1.0  # guidance ends at this share of the way
    norm_limit: float = 0.0  # largest norm of a guided prediction, in norms of the prompt's own; 0: no limit

    def is_active(self, t: Tensor) -> bool:
        """Whether the prediction at this timestep, 0 .. 1000, is guided."""
        return self.negative is not None and (self.truncation >= 1 or 1 - float(t) / 1000 < self.truncation)

    def combine(self, positive: Tensor, negative: Tensor, empty: Tensor | None = None) -> Tensor:
        """The predictions for the prompts (B, C, h, w) -> the guided one."""
        if empty is None:
            guided = negative + self.scale * (positive - negative)
        else:
            guided = empty + self.scale * (positive - empty) - self.negative_scale * (negative - empty)
        return limit_norm(guided, positive, self.norm_limit) if self.norm_limit else guided


@dataclass(frozen=True, kw_only=True)
class DenoisedStep:
    """What one step made."""

    latents: Tensor  # (B, C, h, w), in the scheduler's scale
    noisy: Tensor  # what the model saw
    prediction: Tensor  # and said, guided
    t: Tensor  # at this timestep, 0-d
    number: int  # counted from 1
    count: int  # of all steps
    objective: Objective

    @property
    def is_last(self) -> bool:
        return self.number == self.count

    def estimate_image(self) -> Tensor:
        """The latents that the image would have if the prediction were right."""
        return self.objective.estimate_image(self.prediction, self.noisy, self.objective.level(self.t.cpu().reshape(1)))


@torch.no_grad()
def denoise(model: Family, method: Predictor, request: DenoiseRequest, guidance: Guidance) -> Tensor:
    """Clean latents (B, C, h, w)."""
    return deque(denoise_steps(model, method, request, guidance), maxlen=1).pop().latents


def denoise_steps(
    model: Family, method: Predictor, request: DenoiseRequest, guidance: Guidance
) -> Iterator[DenoisedStep]:
    """Each step, one after the other."""
    scheduler, objective = request.scheduler, choose_objective(model, request)
    objective.set_timesteps(scheduler, request.steps, model.latents, request.noise.shape)
    timesteps, start = scheduler.timesteps, request.start
    if start is None:
        x = objective.scale_initial_noise(scheduler, request.noise)
    else:
        timesteps = skip_timesteps(scheduler, objective, request.steps, start.strength)
        x = start_from(scheduler, objective, start, request.noise, timesteps[0])
    extras = request.extras
    for i, t in enumerate(timesteps):
        active = select_active(request.extras.images, i, len(timesteps))
        if active.keys() != extras.images.keys():
            extras = replace(extras, images=active)
            method.set_batch(model, extras)
        noisy = objective.scale_model_input(scheduler, x, t)
        prediction = predict_regions(model, method, noisy, t, replace(request, extras=extras), guidance)
        if request.growth is not None and request.growth.is_due(i, t, is_last=i + 1 == len(timesteps)):
            x = request.growth.step(scheduler, prediction, t, x, request.generators)
        else:
            x = scheduler.step(prediction, t, x, **_generator_argument(scheduler, request.generators)).prev_sample
            if start is not None:
                following = timesteps[i + 1] if i + 1 < len(timesteps) else None
                x = keep_outside(scheduler, objective, start, x, request.noise, following)
        yield DenoisedStep(
            latents=x, noisy=noisy, prediction=prediction, t=t, number=i + 1, count=len(timesteps), objective=objective
        )


def choose_objective(model: Family, request: DenoiseRequest) -> Objective:
    """The model's own, with the request's shift where it has one."""
    shifted = None if request.flow_shift is None else model.objective.with_shift(request.flow_shift)
    return shifted or model.objective


def predict_regions(
    model: Family, method: Predictor, noisy: Tensor, t: Tensor, request: DenoiseRequest, guidance: Guidance
) -> Tensor:
    """The guided prediction; of several regions the sum of theirs, each with its weight at each place.

    As in MultiDiffusion (Bar-Tal et al. 2023, eq. 5). Each region's is made for the whole image, so that it fits in.
    Where the model can, they are combined after every layer instead.
    """
    if not request.regions:
        return predict_guided(model, method, noisy, t, request, guidance)
    if model.couples_parts:
        return predict_coupled(model, method, noisy, t, request)
    total = torch.zeros_like(noisy, dtype=torch.float32)
    for region in request.regions:
        extras = replace(request.extras, multipliers=region.multipliers)
        method.set_batch(model, extras)
        own = replace(request, text=region.text, extras=extras)
        weight = torch.nn.functional.interpolate(region.weight, size=noisy.shape[-2:])
        total += weight * predict_guided(model, method, noisy, t, own, region.guidance)
    return total


def predict_coupled(model: Family, method: Predictor, noisy: Tensor, t: Tensor, request: DenoiseRequest) -> Tensor:
    """The guided prediction of regions that are rows of one batch, region after region."""
    regions, count, first = request.regions, noisy.shape[0], request.regions[0]
    tables = [region.multipliers for region in regions if region.multipliers is not None]
    images = {
        role: image.map_large(lambda tensor: tensor.repeat(len(regions), 1, 1, 1))
        for role, image in request.extras.images.items()
    }
    extras = Extras(images=images, multipliers=torch.cat(tables) if tables else None)
    guidance = replace(
        first.guidance,
        negative=join_rows([region.guidance.negative for region in regions]),
        empty=join_rows([region.guidance.empty for region in regions]),
    )
    method.set_batch(model, extras)
    own = replace(request, text=join_rows([region.text for region in regions]) or {}, extras=extras)
    with couple_parts(model.denoiser, torch.cat([region.weight for region in regions])):
        return predict_guided(model, method, noisy.repeat(len(regions), 1, 1, 1), t, own, guidance)[:count]


def join_rows(texts: Sequence[Tensors | None]) -> dict[str, Tensor] | None:
    """The denoiser's arguments of several batches as those of one; None where there are none."""
    given = [text for text in texts if text is not None]
    return {name: torch.cat([text[name] for text in given]) for name in given[0]} if given else None


def predict_guided(
    model: Family, method: Predictor, noisy: Tensor, t: Tensor, request: DenoiseRequest, guidance: Guidance
) -> Tensor:
    """What the scheduler's step takes, float32. t: of the whole batch, 0-d."""
    timesteps = t.float().expand(noisy.shape[0])
    prediction = method.predict(model, noisy, timesteps, request.text, request.extras).float()
    if guidance.negative is None or not guidance.is_active(t):
        return prediction
    negative = method.predict(model, noisy, timesteps, guidance.negative, request.extras).float()
    if guidance.empty is None:
        return guidance.combine(prediction, negative)
    empty = method.predict(model, noisy, timesteps, guidance.empty, request.extras).float()
    return guidance.combine(prediction, negative, empty)


def limit_norm(guided: Tensor, plain: Tensor, limit: float) -> Tensor:
    """`guided` (B, C, h, w), the norm of each sample at most `limit` times that of `plain`."""
    lengths = [x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (guided, plain)]
    return guided * (limit * lengths[1] / lengths[0]).clamp(max=1)


def _generator_argument(
    scheduler: Any, generator: Generator | list[Generator]
) -> dict[str, Generator | list[Generator]]:
    """Only some schedulers draw noise in their steps."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if takes else {}
