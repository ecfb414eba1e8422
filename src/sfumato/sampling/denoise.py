"""The denoising loop, over Family.predict with diffusers' schedulers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from sfumato.data.batch import Extras, Tensors
from sfumato.diffusion.objective import Objective
from sfumato.families.base import Family


class Predictor(Protocol):
    """What generating an image needs of a training method, or of the adapters in its place."""

    live_text: frozenset[str]  # encoders that train, whose output is never remembered

    def rewrite_caption(self, text: str) -> str: ...

    def set_batch(self, model: Family, extras: Extras) -> None: ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class DenoiseRequest:
    """A batch of noise to turn into latents, and what its denoising depends on besides model and guidance."""

    noise: Tensor  # standard normal (B, C, h, w)
    text: Tensors  # the denoiser's arguments for the prompts
    scheduler: Any  # of diffusers; its timesteps are set here
    steps: int
    generators: Generator | list[Generator]  # of the noise that some schedulers add: one for all samples, or one each
    extras: Extras = field(default_factory=Extras)  # further images, by role
    flow_shift: float | None = None  # of the time grid, where the objective has such a shift


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6)."""

    negative: Tensors | None = None  # the denoiser's arguments for the negative prompts; None: no guidance
    scale: float = 1.0
    truncation: float = 1.0  # guidance ends at this share of the way
    norm_limit: float = 0.0  # largest norm of a guided prediction, in norms of the prompt's own; 0: no limit

    def is_active(self, t: Tensor) -> bool:
        """Whether the prediction at this timestep, 0 .. 1000, is guided."""
        return self.negative is not None and (self.truncation >= 1 or 1 - float(t) / 1000 < self.truncation)

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The predictions for both prompts (B, C, h, w) -> the guided one."""
        guided = negative + self.scale * (positive - negative)
        return limit_norm(guided, positive, self.norm_limit) if self.norm_limit else guided


@torch.no_grad()
def denoise(model: Family, method: Predictor, request: DenoiseRequest, guidance: Guidance) -> Tensor:
    """Clean latents (B, C, h, w)."""
    scheduler, objective = request.scheduler, choose_objective(model, request)
    objective.set_timesteps(scheduler, request.steps, model.latents, request.noise.shape)
    x = objective.scale_initial_noise(scheduler, request.noise)
    for t in scheduler.timesteps:
        noisy = objective.scale_model_input(scheduler, x, t)
        prediction = predict_guided(model, method, noisy, t, request, guidance)
        x = scheduler.step(prediction, t, x, **_generator_argument(scheduler, request.generators)).prev_sample
    return x


def choose_objective(model: Family, request: DenoiseRequest) -> Objective:
    """The model's own, with the request's shift where it has one."""
    shifted = None if request.flow_shift is None else model.objective.with_shift(request.flow_shift)
    return shifted or model.objective


def predict_guided(
    model: Family, method: Predictor, noisy: Tensor, t: Tensor, request: DenoiseRequest, guidance: Guidance
) -> Tensor:
    """What the scheduler's step takes, float32. t: of the whole batch, 0-d."""
    timesteps = t.float().expand(noisy.shape[0])
    prediction = method.predict(model, noisy, timesteps, request.text, request.extras).float()
    if guidance.negative is None or not guidance.is_active(t):
        return prediction
    negative = method.predict(model, noisy, timesteps, guidance.negative, request.extras).float()
    return guidance.combine(prediction, negative)


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
