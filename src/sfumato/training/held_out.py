"""The validation loss of a model outside of a run: the same images, timesteps and noise, hence the same number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from sfumato.config import Config
from sfumato.data.loader import Loader, LoaderSettings
from sfumato.data.plans import DataPlan
from sfumato.data.split import make_validation_sampler
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import make_recipe
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders
from sfumato.loss import LossContext, LossMethod
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.parallel.single import Single
from sfumato.training.caching import fill_caches
from sfumato.training.goals import make_goal
from sfumato.training.validation import fill_validation_rows, list_validation_times

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """A model whose losses are measured."""

    config: Config  # as it holds for the model, without caches
    context: LossContext

    @property
    def seed(self) -> int:
        return self.config.loop.seed or 0

    @property
    def model(self) -> Family:
        return self.context.model

    @property
    def device(self) -> torch.device:
        return self.context.device

    def forward(self, compute: Callable[[], _T]) -> _T:
        dtype = self.context.mixed_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return compute()


@torch.no_grad()
def measure_held_out_loss(config: Config, plan: DataPlan, model: Family, method: LossMethod) -> float:
    """The mean over the held-out images of the plan and the timesteps. config: as it holds for the model, of a run
    without caches. The model's networks are loaded.
    """
    sampler = make_validation_sampler(config, plan)
    caches = fill_caches(config, plan, model, Single(model.device))  # nothing is asked for, so nothing is encoded
    settings = LoaderSettings(
        max_train_steps=1,
        control_latents=model.takes_control_latents,
        workers=config.loader.workers,
        skip_bad_images=config.dataset.on_bad_image == "skip",
    )
    loader = Loader(sampler, caches, settings)
    source = MeasuredModel(config=config, context=make_measuring_context(config, model, method))
    times = list_validation_times(config)
    table = torch.zeros(sampler.num_ids, len(times), device=model.device)
    for step in loader.steps():
        fill_validation_rows(source, loader, step.batches[0], times, table, seed=sampler.seed)
    return float((table.cpu().double().sum(0) / sampler.num_samples).mean())


def make_measuring_context(config: Config, model: Family, method: LossMethod) -> LossContext:
    return LossContext(
        model=model,
        method=method,
        recipe=make_recipe(config.noise, config.loss, model.objective, config.model.guidance_scale),
        randomness=Randomness(config.loop.seed or 0),
        text=FrozenTextEncoders(model, weighted=config.captions.weighted_captions),
        device=model.device,
        mixed_dtype=MIXED_PRECISION[config.memory.mixed_precision],
        goal=make_goal(config),
    )
