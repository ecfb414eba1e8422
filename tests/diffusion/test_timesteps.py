"""Timestep densities against sd-scripts' numbers; where those are a defect, the reason is here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion import timesteps
from sfumato.diffusion.objective import LatentSpec, RectifiedFlow
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import make_recipe

MATH = json.loads((Path(__file__).parents[1] / "goldens" / "math.json").read_text())
LUMINA = [{"overrides": {"discrete_flow_shift": 6.0}, **row} for row in MATH["lumina_timestep_sampling"]]
ROWS = MATH["flux_timestep_sampling"]["rows"] + LUMINA
LATENTS = LatentSpec(channels=16, downscale=8, patch=2, scale=1.0, shift=0.0, size_multiple=16)
EVEN = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
NAMES = ("discrete_flow_shift", "sigmoid_scale", "weighting_scheme", "logit_mean", "logit_std", "mode_scale")


def options(row: dict[str, Any]) -> NoiseOptions:
    values = {"discrete_flow_shift": 3.0} | {name: row["overrides"][name] for name in NAMES if name in row["overrides"]}
    return NoiseOptions(timestep_sampling=row["timestep_sampling"], **values)


@pytest.mark.parametrize("row", [row for row in ROWS if row["timestep_sampling"] != "sigma"], ids=str)
def test_continuous_densities_from_the_same_draws(row: dict[str, Any]) -> None:
    """The golden draws normal numbers for most; ours takes the share of all normal numbers that are smaller."""
    generator = torch.Generator().manual_seed(row["seed"])
    if row["timestep_sampling"] in ("uniform", "nextdit_shift"):
        u = torch.rand(row["batch"], generator=generator).double()
    else:
        u = torch.special.ndtr(torch.randn(row["batch"], generator=generator).double())
    density = timesteps.make_density(options(row), RectifiedFlow(grid=lambda *_: None))
    assert density(u, row["latent_shape_chw"], LATENTS).tolist() == pytest.approx(row["timesteps"], rel=2e-6)


@pytest.mark.parametrize("row", [row for row in ROWS if row["timestep_sampling"] == "sigma"], ids=str)
def test_sigma_table(row: dict[str, Any]) -> None:
    """The golden counts the table downwards: its u is our 1 - u.

    There a density that leans to u near 1 (logit_mean > 0) trains LESS noise, while the same option for SD3 trains
    more. Ours means more noise everywhere, so the golden's levels are ours for the mirrored u.
    """
    noise = options(row)
    generator = torch.Generator().manual_seed(row["seed"])
    if noise.weighting_scheme == "logit_normal":
        z = torch.normal(noise.logit_mean, noise.logit_std, (row["batch"],), generator=generator)
        u = torch.sigmoid(z)
    else:
        uniform = torch.rand(row["batch"], generator=generator)
        u = timesteps.scheme_density(uniform, noise)
    mirrored = torch.ceil((1 - u) * 1000 - 1e-4) / 1000 - 5e-4  # the middle of the table's cell
    result = 1000 * timesteps.shift_sigma(timesteps.table_level(mirrored), noise.discrete_flow_shift or 3.0)
    assert result.tolist() == pytest.approx(row["timesteps"], rel=1e-5)


@pytest.mark.parametrize("row", MATH["sd3_timesteps"], ids=str)
def test_whole_steps(row: dict[str, Any]) -> None:
    """Every number of the golden, from the same draws; logit-normal ones come from torch.normal there."""
    values = {name: row[name] for name in ("weighting_scheme", "training_shift", "min_timestep", "max_timestep")}
    objective = RectifiedFlow(grid=lambda *_: None, default_sampling="whole_steps")
    density = timesteps.make_density(NoiseOptions(**values), objective)
    generator, count = torch.Generator().manual_seed(row["seed"]), row["batch"]
    if row["weighting_scheme"] == "logit_normal":
        u = torch.special.ndtr(torch.normal(0.0, 1.0, (count,), generator=generator).double())
    else:
        u = torch.rand(count, generator=generator).double()
    result = density(u, (16, 64, 64), LATENTS)
    assert result.tolist() == row["timesteps"]
    level = RectifiedFlow(grid=lambda *_: None).level(result)
    assert level.sigma.tolist() == pytest.approx(row["sigmas"], rel=1e-6)


def test_more_logit_mean_is_more_noise() -> None:
    def mean(logit_mean: float) -> float:
        noise = NoiseOptions(timestep_sampling="sigma", weighting_scheme="logit_normal", logit_mean=logit_mean)
        density = timesteps.make_density(noise, RectifiedFlow(grid=lambda *_: None))
        return float(density(EVEN, (16, 64, 64), LATENTS).mean())

    assert mean(-1.0) + 100 < mean(0.0) < mean(1.0) - 50


@pytest.mark.parametrize(
    "sampling", ["sigma", "uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift", "whole_steps"]
)
def test_timesteps_are_within_the_limits(sampling: str) -> None:
    """--min_timestep and --max_timestep hold for flows too; most of sd-scripts ignore them there."""
    noise = NoiseOptions(min_timestep=200, max_timestep=300)
    density = timesteps.make_density(noise, RectifiedFlow(grid=lambda *_: None, default_sampling=sampling))
    drawn = density(EVEN, (16, 64, 64), LATENTS)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 200
    assert drawn.max() <= 300
    assert drawn.max() - drawn.min() > 50


@pytest.mark.parametrize("case", MATH["time_shift"]["flux"] + MATH["time_shift"]["lumina"], ids=str)
def test_resolution_dependent_shift(case: dict[str, Any]) -> None:
    mu = timesteps.resolution_mu(case["seq_len"])
    assert mu == pytest.approx(case["mu"])
    result = timesteps.shift_sigma(torch.tensor(case["t"]), math.exp(mu))
    assert result.tolist() == pytest.approx(case["out"], rel=1e-5)


def test_uniform_index_keeps_its_bounds() -> None:
    ends = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert timesteps.uniform_index(ends, 3, 6).tolist() == [3.0, 4.0, 5.0]
    assert timesteps.uniform_index(ends, 0, 1000).tolist() == [0.0, 500.0, 999.0]
    # sd-scripts indexes out of its table here.
    assert timesteps.uniform_index(ends, 1000, 1000).tolist() == [999.0] * 3


@pytest.mark.parametrize(
    "sampling", ["sigma", "uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift", "whole_steps"]
)
@pytest.mark.parametrize("scheme", ["uniform", "logit_normal", "mode"])
def test_the_ends_of_the_uniform_numbers_give_timesteps_in_range(sampling: str, scheme: Any) -> None:
    ends = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    objective = RectifiedFlow(grid=lambda *_: None, default_sampling=sampling)
    t = timesteps.make_density(NoiseOptions(weighting_scheme=scheme), objective)(ends, (16, 64, 64), LATENTS)
    assert t.isfinite().all()
    assert t.min() >= 0
    assert t.max() <= 1000


@pytest.mark.parametrize(
    ("sampling", "offset", "mean", "median"),
    [
        ("sigmoid", 0.5, None, 0.622),
        ("sigmoid", -0.5, None, 0.378),
        ("shift", -0.5, 0.621, 0.645),
        ("shift", 0.0, 0.714, 0.750),
        ("shift", 0.5, 0.793, 0.832),
    ],
)
def test_the_offset_moves_the_density_as_in_sd_scripts(
    sampling: Any, offset: float, mean: float | None, median: float
) -> None:
    """The numbers are those of its documentation, for a shift of 3."""
    density = timesteps.make_density(
        NoiseOptions(timestep_sampling=sampling, discrete_flow_shift=3.0), RectifiedFlow(grid=lambda *_: None)
    )
    t = density(timesteps.offset_quantile(EVEN, torch.tensor(offset)), (16, 64, 64), LATENTS) / 1000
    assert t.quantile(0.5).item() == pytest.approx(median, abs=1e-3)
    if mean is not None:
        assert t.mean().item() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("scheme", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("sampling", ["sigma", "uniform", "nextdit_shift"])
def test_an_offset_above_0_is_more_noise_in_every_density(sampling: Any, scheme: Any) -> None:
    noise = NoiseOptions(timestep_sampling=sampling, weighting_scheme=scheme, discrete_flow_shift=3.0)
    recipe = make_recipe(noise, LossOptions(), RectifiedFlow(grid=lambda *_: None), None)
    randomness, ids = Randomness(1), torch.arange(200)
    plain = recipe.timesteps(randomness, ids, (16, 64, 64), LATENTS)
    moved = recipe.timesteps(randomness, ids, (16, 64, 64), LATENTS, torch.full((200,), 0.5))
    assert (moved >= plain).all()
    assert moved.mean() > plain.mean() + 50
