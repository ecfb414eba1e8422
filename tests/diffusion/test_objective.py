"""The objectives against diffusers', sd-scripts' and the papers' formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from sfumato.diffusion.objective import RectifiedFlow, VariancePreserving
from sfumato.errors import UserError
from sfumato.sampling.schedulers import SAMPLERS, make_scheduler

MATH = json.loads((Path(__file__).parents[1] / "goldens" / "math.json").read_text())


@pytest.mark.parametrize("zero", [False, True])
def test_the_schedule_is_that_of_diffusers(zero: bool) -> None:
    ours = VariancePreserving(zero_terminal_snr=zero).alphas_cumprod
    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero
    ).alphas_cumprod
    assert torch.equal(ours, theirs.double())


def test_zero_terminal_snr_rescale() -> None:
    """Lin et al. 2024, alg. 1: sqrt(alphas_cumprod) is shifted and scaled, so all its steps keep their proportion."""
    plain, zero = (VariancePreserving(zero_terminal_snr=flag).alphas_cumprod.sqrt() for flag in (False, True))
    assert zero[-1] == 0
    torch.testing.assert_close(zero[0], plain[0], rtol=0, atol=1e-6)
    ratio = plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(zero.diff(), plain.diff() * ratio, rtol=0, atol=1e-6)


def test_snr_is_zero_at_the_last_timestep() -> None:
    objective = VariancePreserving(predicts="v", zero_terminal_snr=True)
    x0, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    level = objective.level(torch.tensor([999.0]))
    assert level.snr.item() == 0
    assert torch.equal(objective.add_noise(x0, noise, level), noise)
    torch.testing.assert_close(objective.target(x0, noise, level), -x0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_start_from_pure_noise_or_are_refused(name: str) -> None:
    objective = VariancePreserving(predicts="v", zero_terminal_snr=True)
    if name in ("pndm", "lms", "heun", "dpm_2", "dpm_2_a", "dpmsingle"):
        with pytest.raises(UserError, match=name):
            make_scheduler(name, objective)
        return
    scheduler = make_scheduler(name, objective)
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == 999


@pytest.mark.parametrize("space", ["raw", "additive", "sigma_scaled"])
def test_the_exact_velocity_has_no_loss(space: Any) -> None:
    objective = RectifiedFlow(space=space, grid=lambda *_: None)
    x0, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    level = objective.level(torch.tensor([100.0, 700.0]))
    noisy = objective.add_noise(x0, noise, level)
    estimate = objective.estimate(noise - x0, noisy, level)
    torch.testing.assert_close(estimate, objective.target(x0, noise, level), rtol=0, atol=1e-12)


def test_sigma_scaled_is_the_velocity_loss_times_sigma_squared() -> None:
    """sd-scripts compares the image estimate with noise - x0, which no model can reach; ours compares images."""
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
