"""How often each timestep is trained and how much its loss counts, measured on what training calls, as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.data.buckets import Size
from sfumato.diffusion.objective import LatentSpec, Objective
from sfumato.diffusion.recipe import Recipe
from sfumato.track.charts.chart import Axis, Bars, Chart, Line, format_number, make_zero_axis
from sfumato.track.charts.png import draw_charts

SAMPLES, BINS = 20_000, 50
LAST_TIMESTEP = 1000
TIMESTEP_PLOT_HEIGHT = 640


@dataclass(frozen=True, kw_only=True)
class TimestepProfile:
    """Over BINS equal spans of the time from 0 (clean) to 1000 (noise)."""

    density: Sequence[float]  # share of samples; 1 where all timesteps are equally frequent
    weight: Sequence[float]  # factor on a squared error of the network's output


def measure_timesteps(
    recipe: Recipe, objective: Objective, latents: LatentSpec, samples: Mapping[tuple[Size, float], int]
) -> TimestepProfile:
    """Measured on the functions that training calls; `samples`: by the images' (width, height) and timestep offset."""
    total = sum(samples.values())
    u = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    density = torch.zeros(BINS)
    for ((width, height), offset), count in samples.items():
        shape = (latents.channels, height // latents.downscale, width // latents.downscale)
        moved = recipe.shift_quantile(u, torch.tensor(offset)) if offset else u
        t = recipe.timestep(moved, shape, latents)
        density += torch.histc(t, BINS, 0, LAST_TIMESTEP) * (BINS / SAMPLES * count / total)
    middles = (torch.arange(BINS) + 0.5) * (LAST_TIMESTEP / BINS)
    return TimestepProfile(density=density.tolist(), weight=measure_weights(recipe, objective, middles).tolist())


def measure_weights(recipe: Recipe, objective: Objective, t: Tensor) -> Tensor:
    """(B,) the weight of the loss at times t, times the square of d estimate / d prediction."""
    level = objective.level(t)
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    slope = objective.estimate(one, 0 * one, level) - objective.estimate(0 * one, 0 * one, level)
    return recipe.weighting(level, objective) * slope.flatten() ** 2


def draw_timestep_plot(profile: TimestepProfile, *, subtitle: str = "") -> Image.Image:
    """Bars of the density, and below them the curve of the weight."""
    charts = [make_density_chart(profile.density), make_weight_chart(profile.weight)]
    return draw_charts(charts, height=TIMESTEP_PLOT_HEIGHT, title="Timesteps in training", subtitle=subtitle)


def make_density_chart(density: Sequence[float]) -> Chart:
    edges = np.linspace(0, LAST_TIMESTEP, BINS + 1)
    return Chart(
        title="density of the timesteps (1: uniform)",
        x=make_timestep_axis(),
        y=make_zero_axis(find_robust_top(density)),
        bars=[Bars(name="density", left=edges[:-1], right=edges[1:], y=np.asarray(density))],
    )


def make_weight_chart(weight: Sequence[float]) -> Chart:
    middles = (np.arange(BINS) + 0.5) * (LAST_TIMESTEP / BINS)
    top = find_robust_top(weight)
    beyond = f" (up to {format_number(max(weight))})" if max(weight) > top else ""
    return Chart(
        title=f"weight of the prediction's squared error{beyond}",
        x=make_timestep_axis(),
        y=make_zero_axis(top),
        lines=[Line(name="weight", x=middles, y=np.asarray(weight))],
    )


def make_timestep_axis() -> Axis:
    ticks = range(0, LAST_TIMESTEP + 1, 100)
    return Axis(low=0, high=LAST_TIMESTEP, ticks=ticks, name="timestep", ends=("clean", "noise"))


def find_robust_top(values: Sequence[float]) -> float:
    """The end of the y axis: above all values, or above most where a few would flatten the others."""
    ordered = sorted(values)
    high = ordered[round(0.9 * (len(ordered) - 1))]
    return (ordered[-1] if ordered[-1] <= 4 * high else 2 * high) * 1.08 or 1.0
