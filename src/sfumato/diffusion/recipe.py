"""The interchangeable formulas of one run, chosen from the options once before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion.losses import Loss, make_loss
from sfumato.diffusion.noise import Noise, make_noise, make_perturb
from sfumato.diffusion.objective import LatentSpec, Objective
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.timesteps import make_density
from sfumato.diffusion.weightings import Weighting, make_weighting

Timestep = Callable[[Generator, Sequence[int], LatentSpec], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The first three are called per SAMPLE with that sample's own generator, on the CPU."""

    timestep: Timestep  # latent shape (C, h, w) -> 0-d t
    noise: Noise  # latent (C, h, w) -> noise
    perturb: Noise | None = None  # noise -> what only the noised image sees
    loss: Loss  # estimate, target -> elementwise
    weighting: Weighting  # (B,)
    outside_mask: float = 0.0  # weight of the loss to what the model said before training, where masks leave off
    guidance: float | None = None  # embedded guidance during training

    def timesteps(self, rng: Randomness, ids: Tensor, shape: Sequence[int], latents: LatentSpec) -> Tensor:
        """(B,) t in 0 .. 1000 for latents (C, h, w); a function of the samples' ids alone."""
        return rng.per_sample("timestep", ids, lambda draw, _: self.timestep(draw, shape, latents))


def make_recipe(noise: NoiseOptions, loss: LossOptions, objective: Objective, guidance: float | None) -> Recipe:
    return Recipe(
        timestep=make_density(noise, objective),
        noise=make_noise(noise),
        perturb=make_perturb(noise),
        loss=make_loss(loss),
        weighting=make_weighting(noise, loss),
        outside_mask=loss.masked_prior_preservation_weight,
        guidance=guidance,
    )
