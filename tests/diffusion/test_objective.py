"""The noise schedules against diffusers' and the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from sfumato.diffusion.objective import VariancePreserving
from sfumato.errors import UserError
from sfumato.sample import SAMPLERS, make_scheduler


@pytest.mark.parametrize("zero", [False, True])
def test_the_schedule_is_that_of_diffusers(zero: bool) -> None:
    ours = VariancePreserving(zero_terminal_snr=zero).alphas_cumprod
    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero
    ).alphas_cumprod
    assert torch.equal(ours, theirs.double())


def test_a_schedule_that_ends_in_noise() -> None:
    """Lin et al. 2024, alg. 1: sqrt(alphas_cumprod) is moved and stretched, so all its steps keep their proportion."""
    plain, zero = (VariancePreserving(zero_terminal_snr=flag).alphas_cumprod.sqrt() for flag in (False, True))
    assert zero[-1] == 0
    torch.testing.assert_close(zero[0], plain[0], rtol=0, atol=1e-6)
    ratio = plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(zero.diff(), plain.diff() * ratio, rtol=0, atol=1e-6)


def test_nothing_of_the_image_is_left_at_the_last_timestep() -> None:
    objective = VariancePreserving(predicts="v", zero_terminal_snr=True)
    x0, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    level = objective.level(torch.tensor([999.0]))
    assert level.snr.item() == 0
    assert torch.equal(objective.add_noise(x0, noise, level), noise)
    torch.testing.assert_close(objective.target(x0, noise, level), -x0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_start_from_pure_noise_or_say_that_they_cannot(name: str) -> None:
    objective = VariancePreserving(predicts="v", zero_terminal_snr=True)
    if name in ("pndm", "lms", "heun", "dpm_2", "dpm_2_a", "dpmsingle"):
        with pytest.raises(UserError, match=name):
            make_scheduler(name, objective)
        return
    scheduler = make_scheduler(name, objective)
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == 999
