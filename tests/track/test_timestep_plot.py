"""The chart of timesteps: densities and weights against closed forms, and what is drawn where."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.compat.launch import main as run_script
from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion.objective import LatentSpec, Objective, RectifiedFlow, VariancePreserving
from sfumato.diffusion.recipe import make_recipe
from sfumato.track.charts.png import PALETTE, PAPER, fade, place_charts
from sfumato.track.timestep_plot import (
    BINS,
    LAST_TIMESTEP,
    TIMESTEP_PLOT_HEIGHT,
    TimestepProfile,
    draw_timestep_plot,
    make_density_chart,
    make_weight_chart,
    measure_timesteps,
)  # fmt: skip
from toy_runs import make_arguments, make_images, train_toy

LATENTS = LatentSpec(channels=4, downscale=8, patch=2, scale=1.0, shift=0.0, size_multiple=16)
MIDDLES = (np.arange(BINS) + 0.5) * LAST_TIMESTEP / BINS
FLOW = RectifiedFlow(space="raw", grid=lambda scheduler, steps, tokens: None)


def measure(objective: Objective, buckets: dict[tuple[int, int], int], *, gamma: float | None = None, **noise: Any):
    recipe = make_recipe(NoiseOptions(**noise), LossOptions(min_snr_gamma=gamma), objective, None)
    return measure_timesteps(recipe, objective, LATENTS, {(size, 0.0): count for size, count in buckets.items()})


def logit_normal(shift: float) -> np.ndarray:
    """Density of a shifted sigmoid of a standard normal, its mean over each bin."""
    sigma = (np.arange(100 * BINS) + 0.5) / (100 * BINS)
    before = sigma / (shift - (shift - 1) * sigma)
    slope = shift / (1 + (shift - 1) * before) ** 2
    normal = np.exp(-0.5 * np.log(before / (1 - before)) ** 2) / math.sqrt(2 * math.pi)
    return (normal / (before * (1 - before)) / slope).reshape(BINS, 100).mean(1)


def assert_close(density: Any, expected: np.ndarray) -> None:
    """Up to two of 20000 samples on the other side of an edge."""
    assert np.abs(np.asarray(density) - expected).max() < 2.1 * BINS / 20_000


def test_uniform_densities_are_uniform() -> None:
    assert_close(measure(VariancePreserving(), {(512, 512): 1}).density, np.ones(BINS))
    assert_close(measure(FLOW, {(512, 512): 1}, timestep_sampling="uniform").density, np.ones(BINS))
    half = measure(VariancePreserving(), {(512, 512): 1}, max_timestep=500).density
    assert_close(half, np.where(MIDDLES < 500, 2.0, 0.0))


@pytest.mark.parametrize("shift", [1.0, 3.1582])
def test_a_shifted_density(shift: float) -> None:
    options: dict[str, Any] = {"timestep_sampling": "shift", "discrete_flow_shift": shift}
    assert_close(measure(FLOW, {(512, 512): 1}, **options).density, logit_normal(shift))


def test_sizes_count_by_their_samples() -> None:
    """Where the density depends on the image's size: a mixture by the numbers of samples."""
    shifts = {(256, 256): math.exp(0.5), (1024, 1024): math.exp(1.15)}
    expected = 0.25 * logit_normal(shifts[256, 256]) + 0.75 * logit_normal(shifts[1024, 1024])
    assert_close(measure(FLOW, {(256, 256): 10, (1024, 1024): 30}, timestep_sampling="flux_shift").density, expected)


def test_weights() -> None:
    """cosmap on the velocity; an image's error is sigma^2 times the velocity's; min-SNR for noise."""
    sigma = MIDDLES / LAST_TIMESTEP
    options: dict[str, Any] = {"timestep_sampling": "uniform"}
    cosmap = measure(FLOW, {(64, 64): 1}, weighting_scheme="cosmap", **options).weight
    assert cosmap == pytest.approx((2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))).tolist())
    image = RectifiedFlow(space="sigma_scaled", grid=FLOW.grid)
    assert measure(image, {(64, 64): 1}, **options).weight == pytest.approx((sigma**2).tolist())
    objective = VariancePreserving()
    alphas_cumprod = objective.alphas_cumprod[torch.from_numpy(MIDDLES).long()].numpy()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    assert measure(objective, {(64, 64): 1}, gamma=5).weight == pytest.approx((np.minimum(snr, 5) / snr).tolist())


def near(image: Image.Image, x: float, y: float, color: str) -> bool:
    pixel = image.getpixel((round(x), round(y)))
    assert isinstance(pixel, tuple)
    return all(abs(a - b) < 40 for a, b in zip(pixel, ImageColor.getrgb(color), strict=True))


def test_bars_and_curve_are_where_their_values_are() -> None:
    density = [0.5] * 25 + [1.5] * 25
    weight = [1.0] * 49 + [100.0]
    image = draw_timestep_plot(TimestepProfile(density=density, weight=weight), subtitle="a model")
    charts = [make_density_chart(density), make_weight_chart(weight)]
    upper, lower = place_charts(charts, height=TIMESTEP_PLOT_HEIGHT, right=912)
    assert near(image, upper.x(810), upper.y(1.4), fade(PALETTE[0]))
    assert near(image, upper.x(210), upper.y(0.4), fade(PALETTE[0]))
    assert near(image, upper.x(210), upper.y(0.7), PAPER)
    assert near(image, lower.x(410), lower.y(1.0), PALETTE[0])
    assert lower.y_axis.high < 5  # one value beyond all others leaves them their height


def test_plan_and_training_draw_it(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    toy, images = toy_shelf.paths("flux"), make_images(tmp_path / "images", 2)
    options = {"timestep_sampling": "flux_shift", "network_train_unet_only": True, "max_train_steps": 1}
    line = make_arguments(toy, images, tmp_path / "out", plot_timesteps=tmp_path / "plan" / "t.png", **options)
    assert main(["plan", *line]) == 0
    train_toy(toy, images, tmp_path / "out", plot_timesteps=tmp_path / "train.png", **options)
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("plan/t.png", "train.png"))
    assert np.array_equal(first, second)
    assert not (tmp_path / "out" / "t.png").exists()


@pytest.mark.full
def test_a_script_shows_timesteps_and_trains_nothing(
    toy_shelf: ToyShelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy, images = toy_shelf.paths("flux"), make_images(tmp_path / "images", 2)
    line = make_arguments(toy, images, tmp_path / "out", timestep_sampling="sigmoid", sigmoid_scale=2.0)
    assert run_script(["flux_train_network", *line, "--show_timesteps", "console"]) == 0
    shown = capsys.readouterr().out.splitlines()
    densities = [float(row.split()[3]) for row in shown if row.strip()[0].isdigit()]
    edges = np.linspace(0, 1, len(densities) + 1)
    with np.errstate(divide="ignore"):
        below = normal_cdf(np.log(edges / (1 - edges)) / 2)
    assert np.allclose(densities, np.diff(below) * len(densities), atol=5e-3)  # t = sigmoid(2 n)
    assert run_script(["flux_train_network", *line, "--show_timesteps", "console", "--show_timesteps_offset", "1"]) == 0
    moved = [float(row.split()[3]) for row in capsys.readouterr().out.splitlines() if row.strip()[0].isdigit()]
    assert sum(moved[:12]) < sum(densities[:12])
    assert run_script(["flux_train_network", *line, "--show_timesteps", "image"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora.timesteps.png"]


def normal_cdf(values: np.ndarray) -> np.ndarray:
    return np.array([NormalDist().cdf(value) if np.isfinite(value) else float(value > 0) for value in values])
