"""The picture of timesteps: shares and weights against closed forms, and what is drawn where."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion.objective import LatentSpec, Objective, RectifiedFlow, VariancePreserving
from sfumato.diffusion.recipe import make_recipe
from sfumato.track.drawing import ACCENT, FINE, PALE, PAPER
from sfumato.track.timesteps import BINS, LAST, PANELS, Course, Panel, ceiling, course, timestep_plot
from training import arguments, pictures, run

LATENTS = LatentSpec(channels=4, downscale=8, patch=2, scale=1.0, shift=0.0, size_multiple=16)
MIDDLES = (np.arange(BINS) + 0.5) * LAST / BINS
FLOW = RectifiedFlow(space="raw", grid=lambda scheduler, steps, tokens: None)


def found(objective: Objective, buckets: dict[tuple[int, int], int], *, gamma: float | None = None, **noise: Any):
    recipe = make_recipe(NoiseOptions(**noise), LossOptions(min_snr_gamma=gamma), objective, None)
    return course(recipe, objective, LATENTS, buckets)


def logit_normal(shift: float) -> np.ndarray:
    """Density of a shifted sigmoid of a standard normal, its mean over each bin."""
    sigma = (np.arange(100 * BINS) + 0.5) / (100 * BINS)
    before = sigma / (shift - (shift - 1) * sigma)
    slope = shift / (1 + (shift - 1) * before) ** 2
    normal = np.exp(-0.5 * np.log(before / (1 - before)) ** 2) / math.sqrt(2 * math.pi)
    return (normal / (before * (1 - before)) / slope).reshape(BINS, 100).mean(1)


def close(often: Any, expected: np.ndarray) -> None:
    """But for a number or two of 20000 that lie on the other side of an edge."""
    assert np.abs(np.asarray(often) - expected).max() < 2.1 * BINS / 20_000


def test_even_draws_are_even() -> None:
    close(found(VariancePreserving(), {(512, 512): 1}).often, np.ones(BINS))
    close(found(FLOW, {(512, 512): 1}, timestep_sampling="uniform").often, np.ones(BINS))
    half = found(VariancePreserving(), {(512, 512): 1}, max_timestep=500).often
    close(half, np.where(MIDDLES < 500, 2.0, 0.0))


@pytest.mark.parametrize("shift", [1.0, 3.1582])
def test_a_shifted_density(shift: float) -> None:
    options: dict[str, Any] = {"timestep_sampling": "shift", "discrete_flow_shift": shift}
    close(found(FLOW, {(512, 512): 1}, **options).often, logit_normal(shift))


def test_every_size_has_its_share() -> None:
    """Where the density depends on the picture's size: a mixture by the numbers of samples."""
    shifts = {(256, 256): math.exp(0.5), (1024, 1024): math.exp(1.15)}
    expected = 0.25 * logit_normal(shifts[256, 256]) + 0.75 * logit_normal(shifts[1024, 1024])
    close(found(FLOW, {(256, 256): 10, (1024, 1024): 30}, timestep_sampling="flux_shift").often, expected)


def test_weights() -> None:
    """cosmap on the velocity; an image's error is sigma^2 times the velocity's; min-SNR for noise."""
    sigma = MIDDLES / LAST
    options: dict[str, Any] = {"timestep_sampling": "uniform"}
    cosmap = found(FLOW, {(64, 64): 1}, weighting_scheme="cosmap", **options).counts
    assert cosmap == pytest.approx((2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))).tolist())
    image = RectifiedFlow(space="sigma_scaled", grid=FLOW.grid)
    assert found(image, {(64, 64): 1}, **options).counts == pytest.approx((sigma**2).tolist())
    objective = VariancePreserving()
    kept = objective.alphas_cumprod[torch.from_numpy(MIDDLES).long()].numpy()
    snr = kept / (1 - kept)
    assert found(objective, {(64, 64): 1}, gamma=5).counts == pytest.approx((np.minimum(snr, 5) / snr).tolist())


def near(picture: Image.Image, place: tuple[float, float], colour: str) -> bool:
    pixel = picture.getpixel((round(place[0] / FINE), round(place[1] / FINE)))
    assert isinstance(pixel, tuple)
    return all(abs(a - b) < 40 for a, b in zip(pixel, ImageColor.getrgb(colour), strict=False))


def test_bars_and_curve_are_where_their_values_are() -> None:
    often = [0.5] * 25 + [1.5] * 25
    counts = [1.0] * 49 + [100.0]
    picture = timestep_plot(Course(often=often, counts=counts), subtitle="a model")
    upper, lower = Panel(edges=PANELS[0], top=ceiling(often)), Panel(edges=PANELS[1], top=ceiling(counts))
    assert near(picture, (upper.x(40.5), upper.y(1.4)), PALE)
    assert near(picture, (upper.x(10.5), upper.y(0.4)), PALE)
    assert near(picture, (upper.x(10.5), upper.y(0.7)), PAPER)
    assert near(picture, (lower.x(20.5), lower.y(1.0)), ACCENT)
    assert lower.top < 5  # one value beyond all others leaves them their height


def test_plan_and_training_draw_it(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    toy, images = toy_shelf.paths("flux"), pictures(tmp_path / "images", 2)
    options = {"timestep_sampling": "flux_shift", "network_train_unet_only": True, "max_train_steps": 1}
    line = arguments(toy, images, tmp_path / "out", plot_timesteps=tmp_path / "plan" / "t.png", **options)
    assert main(["plan", *line]) == 0
    run(toy, images, tmp_path / "out", plot_timesteps=tmp_path / "train.png", **options)
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("plan/t.png", "train.png"))
    assert np.array_equal(first, second)
    assert not (tmp_path / "out" / "t.png").exists()
