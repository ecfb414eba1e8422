"""Timestep densities and flow weightings against the field's numbers; where those are a defect, the reason is here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion import timesteps
from sfumato.diffusion.objective import LatentSpec, Level, RectifiedFlow, VariancePreserving
from sfumato.diffusion.weightings import cosmap, make_weighting, sigma_sqrt

MATH = json.loads((Path(__file__).parents[1] / "goldens" / "math.json").read_text())
LUMINA = [{"overrides": {"discrete_flow_shift": 6.0}, **row} for row in MATH["lumina_timestep_sampling"]]
ROWS = MATH["flux_timestep_sampling"]["rows"] + LUMINA
LATENTS = LatentSpec(channels=16, downscale=8, patch=2, scale=1.0, shift=0.0, size_multiple=16)
EVEN = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
NAMES = ("discrete_flow_shift", "sigmoid_scale", "weighting_scheme", "logit_mean", "logit_std", "mode_scale")


def options(row: dict[str, Any]) -> NoiseOptions:
    given = {"discrete_flow_shift": 3.0} | {name: row["overrides"][name] for name in NAMES if name in row["overrides"]}
    return NoiseOptions(timestep_sampling=row["timestep_sampling"], **given)


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
    """The golden walks the table downwards: its u is our 1 - u.

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
    found = 1000 * timesteps.shifted(timesteps.table_level(mirrored), noise.discrete_flow_shift or 3.0)
    assert found.tolist() == pytest.approx(row["timesteps"], rel=1e-5)


@pytest.mark.parametrize("row", MATH["sd3_timesteps"], ids=str)
def test_whole_steps(row: dict[str, Any]) -> None:
    """Every number of the golden, from the same draws; logit-normal ones come from torch.normal there."""
    given = {name: row[name] for name in ("weighting_scheme", "training_shift", "min_timestep", "max_timestep")}
    objective = RectifiedFlow(grid=lambda *_: None, usual_sampling="whole_steps")
    density = timesteps.make_density(NoiseOptions(**given), objective)
    generator, count = torch.Generator().manual_seed(row["seed"]), row["batch"]
    if row["weighting_scheme"] == "logit_normal":
        u = torch.special.ndtr(torch.normal(0.0, 1.0, (count,), generator=generator).double())
    else:
        u = torch.rand(count, generator=generator).double()
    found = density(u, (16, 64, 64), LATENTS)
    assert found.tolist() == row["timesteps"]
    level = RectifiedFlow(grid=lambda *_: None).level(found)
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
def test_bounds_are_kept(sampling: str) -> None:
    """--min_timestep and --max_timestep hold for flows too; most of the field's scripts forget them."""
    noise = NoiseOptions(min_timestep=200, max_timestep=300)
    density = timesteps.make_density(noise, RectifiedFlow(grid=lambda *_: None, usual_sampling=sampling))
    drawn = density(EVEN, (16, 64, 64), LATENTS)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 200
    assert drawn.max() <= 300
    assert drawn.max() - drawn.min() > 50


@pytest.mark.parametrize("case", MATH["time_shift"]["flux"] + MATH["time_shift"]["lumina"], ids=str)
def test_resolution_dependent_shift(case: dict[str, Any]) -> None:
    mu = timesteps.resolution_mu(case["seq_len"])
    assert mu == pytest.approx(case["mu"])
    found = timesteps.shifted(torch.tensor(case["t"]), math.exp(mu))
    assert found.tolist() == pytest.approx(case["out"], rel=1e-5)


def test_flow_weightings() -> None:
    golden = MATH["flow_loss_weighting"]
    sigma = torch.tensor(golden["sigmas"], dtype=torch.float64)
    objective = RectifiedFlow(grid=lambda *_: None)
    for scheme, weights in golden["weights"].items():
        found = make_weighting(NoiseOptions(weighting_scheme=scheme), LossOptions())(
            Level(sigma * 1000, 1 - sigma, sigma), objective
        )
        assert found.tolist() == pytest.approx(weights, rel=1e-5), scheme


def test_weightings_are_finite_at_both_ends() -> None:
    level = RectifiedFlow(grid=lambda *_: None).level(torch.tensor([0.0, 1000.0]))
    for weighting in (sigma_sqrt, cosmap):
        assert weighting(level, RectifiedFlow(grid=lambda *_: None)).isfinite().all()


@pytest.mark.parametrize("space", ["raw", "additive", "sigma_scaled"])
def test_the_exact_velocity_has_no_loss(space: Any) -> None:
    objective = RectifiedFlow(space=space, grid=lambda *_: None)
    x0, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    level = objective.level(torch.tensor([100.0, 700.0]))
    noisy = objective.add_noise(x0, noise, level)
    estimate = objective.estimate(noise - x0, noisy, level)
    torch.testing.assert_close(estimate, objective.target(x0, noise, level), rtol=0, atol=1e-12)


def test_sigma_scaled_is_the_velocity_loss_times_sigma_squared() -> None:
    """The field compares the image estimate with noise - x0, which no model can reach; ours compares images."""
    x0, noise, guess = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    raw, scaled = (RectifiedFlow(space=space, grid=lambda *_: None) for space in ("raw", "sigma_scaled"))
    level = raw.level(torch.tensor([100.0, 700.0]))
    noisy = raw.add_noise(x0, noise, level)

    def error(objective: RectifiedFlow) -> torch.Tensor:
        return (objective.estimate(guess, noisy, level) - objective.target(x0, noise, level)) ** 2

    factor = (level.sigma**2).reshape(2, 1, 1, 1)
    torch.testing.assert_close(error(scaled), factor * error(raw), rtol=1e-10, atol=0)


def test_variance_preserving_schedule() -> None:
    golden = MATH["scheduler"]
    objective = VariancePreserving()
    level = objective.level(torch.tensor(golden["timesteps"], dtype=torch.float32))
    assert objective.alphas_cumprod[golden["timesteps"]].tolist() == pytest.approx(golden["alphas_cumprod"], rel=1e-6)
    assert level.snr.tolist() == pytest.approx(golden["all_snr"], rel=2e-5)


def test_uniform_index_keeps_its_bounds() -> None:
    ends = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert timesteps.uniform_index(ends, 3, 6).tolist() == [3.0, 4.0, 5.0]
    assert timesteps.uniform_index(ends, 0, 1000).tolist() == [0.0, 500.0, 999.0]
    # The field indexes out of its table here.
    assert timesteps.uniform_index(ends, 1000, 1000).tolist() == [999.0] * 3


@pytest.mark.parametrize(
    "sampling", ["sigma", "uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift", "whole_steps"]
)
@pytest.mark.parametrize("scheme", ["uniform", "logit_normal", "mode"])
def test_the_ends_of_the_uniform_numbers_give_times_in_range(sampling: str, scheme: Any) -> None:
    ends = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    objective = RectifiedFlow(grid=lambda *_: None, usual_sampling=sampling)
    t = timesteps.make_density(NoiseOptions(weighting_scheme=scheme), objective)(ends, (16, 64, 64), LATENTS)
    assert t.isfinite().all()
    assert t.min() >= 0
    assert t.max() <= 1000
