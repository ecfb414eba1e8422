"""Stratified timesteps: how even, in which density, and the same for any batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families.toys import ToyShelf
from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion.objective import LatentSpec, Objective, RectifiedFlow, VariancePreserving
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import make_recipe
from sfumato.training.latents import load_latents
from toy_runs import build_toy_run, make_images

LATENTS = LatentSpec(channels=16, downscale=8, patch=2, scale=1.0, shift=0.0, size_multiple=16)
SHAPE = (16, 64, 96)  # 1536 tokens
MU = 0.5 + (1536 - 256) * (1.15 - 0.5) / (4096 - 256)  # of FLUX.1: through (256, 0.5) and (4096, 1.15)
FLOW = RectifiedFlow(grid=lambda *_: None)
WHOLE = RectifiedFlow(grid=lambda *_: None, default_sampling="whole_steps")
Share = Callable[[np.ndarray], np.ndarray]  # of all samples below sigma (t / 1000)


def star_discrepancy(u: np.ndarray) -> float:
    """The largest difference between x and the share of numbers below x (Niederreiter 1992, theorem 2.6)."""
    count = len(u)
    return float(np.abs(np.sort(u) - (np.arange(count) + 0.5) / count).max()) + 0.5 / count


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**62), first=st.integers(0, 2**40), count=st.integers(2, 3000), cut=st.integers(1, 2999))
def test_consecutive_ids_are_evenly_spread(seed: int, first: int, count: int, cut: int) -> None:
    """N D = O(log N), as for every multiple of a number with bounded partial quotients (Kuipers & Niederreiter 1974,
    theorem 2.3.4); independent numbers give sqrt(N). For any batches of the ids."""
    randomness, ids = Randomness(seed), torch.arange(first, first + count)
    u = randomness.stratified_uniform("timestep", ids)
    assert 0 <= u.min() <= u.max() < 1
    assert star_discrepancy(u.numpy()) <= (1.5 + 0.5 * math.log(count)) / count
    cut = min(cut, count - 1)
    assert torch.equal(
        torch.cat([randomness.stratified_uniform("timestep", part) for part in (ids[:cut], ids[cut:])]), u
    )


def test_seeds_start_at_different_numbers() -> None:
    first = torch.tensor(
        [Randomness(seed).stratified_uniform("timestep", torch.arange(1)).item() for seed in range(2000)]
    )
    assert star_discrepancy(first.numpy()) < 1.95 / math.sqrt(2000)  # once in a thousand kinds of chance it is more


def shifted(share: Share, shift: float) -> Share:
    return lambda sigma: share(sigma / (shift - (shift - 1) * sigma))


def logistic_normal(mean: float = 0.0, deviation: float = 1.0) -> Share:
    cdf = np.vectorize(NormalDist(mean, deviation).cdf)
    return lambda sigma: cdf(np.log(sigma / (1 - sigma)))


def mode(scale: float) -> Share:
    """u' = 1 - u - s (cos^2(pi u / 2) - 1 + u) falls as u grows; solved on a fine grid."""
    u = np.linspace(0, 1, 200_001)
    table = 1 - u - scale * (np.cos(math.pi * u / 2) ** 2 - 1 + u)
    return lambda sigma: np.interp(sigma, table[::-1], (1 - u)[::-1])


def even(sigma: np.ndarray) -> np.ndarray:
    return sigma


# (objective, options, share of samples below each sigma, steps that t is rounded to)
DENSITIES: dict[str, tuple[Objective, dict[str, Any], Share, float]] = {
    "vp": (VariancePreserving(), {}, even, 1.0),
    "vp-limits": (VariancePreserving(), {"min_timestep": 200, "max_timestep": 700}, lambda s: (s - 0.2) / 0.5, 1.0),
    "uniform": (FLOW, {"timestep_sampling": "uniform"}, even, 0.0),
    "uniform-limits": (
        FLOW,
        {"timestep_sampling": "uniform", "min_timestep": 100, "max_timestep": 400},
        lambda s: (s - 0.1) / 0.3,
        0.0,
    ),
    "sigmoid": (FLOW, {"timestep_sampling": "sigmoid", "sigmoid_scale": 1.3}, logistic_normal(deviation=1.3), 0.0),
    "shift": (
        FLOW,
        {"timestep_sampling": "shift", "discrete_flow_shift": 3.1582},
        shifted(logistic_normal(), 3.1582),
        0.0,
    ),
    "flux_shift": (FLOW, {"timestep_sampling": "flux_shift"}, shifted(logistic_normal(), math.exp(MU)), 0.0),
    "nextdit_shift": (FLOW, {"timestep_sampling": "nextdit_shift"}, shifted(even, math.exp(MU)), 0.0),
    "sigma": (FLOW, {"timestep_sampling": "sigma", "discrete_flow_shift": 3.0}, shifted(even, 3.0), 3.0),
    "logit_normal": (
        FLOW,
        {
            "timestep_sampling": "sigma",
            "discrete_flow_shift": 1.0,
            "weighting_scheme": "logit_normal",
            "logit_mean": 0.4,
            "logit_std": 0.8,
        },
        logistic_normal(0.4, 0.8),
        1.0,
    ),
    "mode": (
        FLOW,
        {"timestep_sampling": "sigma", "discrete_flow_shift": 1.0, "weighting_scheme": "mode", "mode_scale": 1.29},
        mode(1.29),
        1.0,
    ),
    "whole_steps": (WHOLE, {"training_shift": 2.0}, shifted(even, 2.0), 1.0),
    "whole_steps-logit_normal": (WHOLE, {"weighting_scheme": "logit_normal"}, logistic_normal(), 1.0),
}


def distance(t: torch.Tensor, share: Share, step: float) -> float:
    """Kolmogorov-Smirnov, between the timesteps and a density; rounded timesteps may be a step away."""
    sigma = np.sort(t.double().numpy()) / 1000
    count = len(sigma)
    with np.errstate(divide="ignore"):
        low, high = (np.clip(share(np.clip(sigma + way * step / 1000, 0, 1)), 0, 1) for way in (-1, 1))
    above, below = np.arange(1, count + 1) / count, np.arange(count) / count
    if not step:
        return float(np.maximum(above - low, high - below).max())
    return float(np.maximum(below - high, low - above).max().clip(0)) + 1 / count


@pytest.mark.parametrize("name", DENSITIES)
def test_every_density_is_met_far_closer_than_by_independent_draws(name: str) -> None:
    objective, options, share, step = DENSITIES[name]
    ids = torch.arange(5_000, 6_000)
    far = []
    for stratified in (True, False):
        noise = NoiseOptions(timestep_stratified=stratified, **options)
        recipe = make_recipe(noise, LossOptions(), objective, None)
        far.append(distance(recipe.timesteps(Randomness(3), ids, SHAPE, LATENTS), share, step))
    assert far[0] < 0.004  # 1000 numbers drawn by themselves: 0.028 on average
    assert far[1] < 0.055  # one in 250 of such draws is farther away
    assert far[0] < far[1] / 2


Toy = Mapping[str, Path]


def drawn_timesteps(toy: Toy, images: Path, output: Path, **options: Any) -> dict[int, float]:
    """id -> t over the first two epochs."""
    options = {"timestep_stratified": True, "network_train_unet_only": True, **options}
    training = build_toy_run(toy, images, output, **options)
    context = training.context
    timesteps: dict[int, float] = {}
    for step in islice(training.loader.steps(), 2 * training.plan.steps_per_epoch):
        for batch in step.batches:
            shape = load_latents(training, batch).shape[1:]
            t = context.recipe.timesteps(context.randomness, batch.ids, shape, training.model.latents)
            timesteps |= dict(zip(batch.ids.tolist(), t.tolist(), strict=True))
    return timesteps


@pytest.mark.full
def test_batches_and_accumulation_change_nothing(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 5)
    toy = toy_shelf.paths("flux")
    options: dict[str, Any] = {"timestep_sampling": "shift", "discrete_flow_shift": 3}
    one = drawn_timesteps(toy, images, tmp_path / "out", **options)
    assert list(one) == list(range(20))
    for more in ({"train_batch_size": 3}, {"gradient_accumulation_steps": 4}):
        assert drawn_timesteps(toy, images, tmp_path / "out", **options, **more) == one
    assert drawn_timesteps(toy, images, tmp_path / "out", **options, timestep_stratified=False) != one
    sigma = np.sort(list(one.values())) / 1000
    share = shifted(logistic_normal(), 3.0)(sigma)
    assert star_discrepancy(share) < 0.1  # of 20 numbers drawn by themselves: 0.19 on average
