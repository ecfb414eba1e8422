"""The formulas of one run, chosen once from the options: timesteps, noise, loss, weighting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion.losses import Loss, make_loss
from sfumato.diffusion.noise import Noise, make_noise, make_perturb
from sfumato.diffusion.objective import LatentSpec, Objective
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.timesteps import Timestep, is_falling, make_density, offset_quantile
from sfumato.diffusion.uncertainty import Uncertainty
from sfumato.diffusion.weightings import Weighting, make_weighting


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`noise` and `perturb` are called per sample with that sample's own generator, on the CPU."""

    timestep: Timestep  # uniform numbers (B,) and the latents' shape (C, h, w) -> t (B,)
    stratified: bool = False  # whether those numbers are stratified over the samples instead of independent
    falling: bool = False  # whether larger ones mean less noise
    noise: Noise  # latent (C, h, w) -> noise
    perturb: Noise | None = None  # noise -> the noise of the model's input alone
    loss: Loss  # estimate, target -> elementwise
    weighting: Weighting  # (B,)
    outside_mask: float = 0.0  # weight, outside the masks, of the loss to the untrained model's prediction
    uncertainty: Uncertainty | None = None  # a learned weighting in place of `weighting`
    guidance: float | None = None  # embedded guidance scale during training

    def timesteps(
        self,
        rng: Randomness,
        ids: Tensor,
        shape: Sequence[int],
        latents: LatentSpec,
        offset: Tensor | None = None,
    ) -> Tensor:
        """(B,) t in 0 .. 1000 for latents (C, h, w); a function of the samples' ids and offsets (B,) alone.

        offset: added to the normal quantile of each sample's uniform number, towards more noise.
        """
        u = self.draw_quantiles(rng, ids)
        return self.timestep(u if offset is None else self.shift_quantile(u, offset), shape, latents)

    def draw_quantiles(self, rng: Randomness, ids: Tensor) -> Tensor:
        """(B,) the samples' uniform numbers."""
        return rng.stratified_uniform("timestep", ids) if self.stratified else rng.uniform("timestep", ids)

    def shift_quantile(self, u: Tensor, offset: Tensor) -> Tensor:
        """Uniform numbers moved towards more noise where the offset is above 0."""
        return offset_quantile(u, -offset if self.falling else offset)


def make_recipe(
    noise: NoiseOptions,
    loss: LossOptions,
    objective: Objective,
    guidance: float | None,
    uncertainty: Uncertainty | None = None,
) -> Recipe:
    return Recipe(
        timestep=make_density(noise, objective),
        stratified=noise.timestep_stratified,
        falling=is_falling(noise, objective),
        noise=make_noise(noise),
        perturb=make_perturb(noise),
        loss=make_loss(loss),
        weighting=make_weighting(noise, loss),
        outside_mask=loss.masked_prior_preservation_weight,
        uncertainty=uncertainty,
        guidance=guidance,
    )
