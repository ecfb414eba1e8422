"""Loss weightings against sd-scripts' numbers and the papers' formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion.objective import Level, Objective, RectifiedFlow, VariancePreserving
from sfumato.diffusion.weightings import cosmap, make_weighting, sigma_sqrt

MATH = json.loads((Path(__file__).parents[1] / "goldens" / "math.json").read_text())
EPSILON, V = VariancePreserving(), VariancePreserving(predicts="v")
ZERO_SNR = {
    "epsilon": VariancePreserving(zero_terminal_snr=True),
    "v": VariancePreserving(predicts="v", zero_terminal_snr=True),
}
FLOW = RectifiedFlow(grid=lambda *_: None)


def level(timesteps: list[int], objective: Objective = EPSILON) -> Level:
    return objective.level(torch.tensor(timesteps, dtype=torch.float32))


def weights(objective: Objective, timesteps: list[int], **options: Any) -> list[float]:
    weighting = make_weighting(NoiseOptions(), LossOptions(**options))
    return weighting(level(timesteps, objective), objective).tolist()


@pytest.mark.parametrize("row", MATH["min_snr_weight"], ids=str)
def test_min_snr(row: dict[str, Any]) -> None:
    objective = V if row["v_prediction"] else EPSILON
    assert weights(objective, row["timesteps"], min_snr_gamma=row["gamma"]) == pytest.approx(row["weight"], rel=1e-5)


@pytest.mark.parametrize("row", MATH["debiased_weight"], ids=str)
def test_debiased(row: dict[str, Any]) -> None:
    values = weights(V if row["v_prediction"] else EPSILON, row["timesteps"], debiased_estimation_loss=True)
    assert values == pytest.approx(row["weight"], rel=1e-5)


def test_v_weighted_like_noise() -> None:
    row = MATH["scale_v_pred_loss_like_noise_pred"]
    values = weights(V, row["timesteps"], scale_v_pred_loss_like_noise_pred=True)
    assert values == pytest.approx(row["weight"], rel=1e-5)


@pytest.mark.parametrize("row", MATH["v_pred_like_loss"], ids=str)
def test_noise_plus_a_share_of_v(row: dict[str, Any]) -> None:
    assert weights(EPSILON, row["timesteps"], v_pred_like_loss=row["value"]) == pytest.approx(row["weight"], rel=1e-5)


@pytest.mark.parametrize(("name", "key"), [("epsilon", "min_snr5_eps"), ("v", "min_snr5_v")])
def test_weights_use_the_rescaled_schedule(name: str, key: str) -> None:
    """The reference takes SNR before it changes the schedule. At the end its formula is 0 / 0; the limit is 1, or 0."""
    golden = MATH["zero_terminal_snr"]
    values = weights(ZERO_SNR[name], golden["timesteps"], min_snr_gamma=5)
    wanted = golden["if_all_snr_were_taken_after_the_fix"][key]
    assert wanted[-1] in (None, 0)
    assert values[:-1] == pytest.approx(wanted[:-1], rel=1e-4)
    assert values[-1] == pytest.approx(1.0 if name == "epsilon" else 0.0, abs=1e-7)


@pytest.mark.parametrize(
    ("objective", "options", "limit"),
    [
        (ZERO_SNR["epsilon"], {"debiased_estimation_loss": True}, 0.0),  # 1 / sqrt(SNR)
        (ZERO_SNR["v"], {"debiased_estimation_loss": True}, 1.0),
        (ZERO_SNR["epsilon"], {"v_pred_like_loss": 0.5}, 1.0),
        (ZERO_SNR["v"], {"scale_v_pred_loss_like_noise_pred": True}, 0.0),
        (ZERO_SNR["epsilon"], {"soft_min_snr_gamma": 5}, 1.0),
        (ZERO_SNR["epsilon"], {"p2_gamma": 1.0}, 1.0),
        (ZERO_SNR["v"], {"p2_gamma": 1.0}, 0.0),
    ],
)
def test_weights_at_snr_zero(objective: Any, options: Any, limit: float) -> None:
    assert weights(objective, [999], **options) == pytest.approx([limit], abs=1e-6)


def closed_form(at: Level, w: Tensor) -> Tensor:
    """A weight of the image's error, on a velocity: x_0 = x_sigma - sigma v."""
    return w * at.sigma**2


def test_image_weights_of_flows() -> None:
    at = level([100, 500, 900], FLOW)
    snr = ((1 - at.sigma) / at.sigma) ** 2
    for options, w in (
        ({"min_snr_gamma": 5}, snr.clamp(max=5)),
        ({"soft_min_snr_gamma": 5}, 5 * snr / (5 + snr)),
        ({"p2_gamma": 0.5, "p2_k": 2}, snr / (2 + snr) ** 0.5),
    ):
        assert weights(FLOW, [100, 500, 900], **options) == pytest.approx(closed_form(at, w).tolist())
        assert all(map(math.isfinite, weights(FLOW, [0, 1000], **options)))
        in_images = RectifiedFlow(space="sigma_scaled", grid=lambda *_: None)
        assert weights(in_images, [100, 500, 900], **options) == pytest.approx(w.tolist())


def test_p2_on_noise_is_the_papers() -> None:
    snr = level([10, 500, 900]).snr
    assert weights(EPSILON, [10, 500, 900], p2_gamma=1.0) == pytest.approx((1 / (1 + snr)).tolist())


def test_several_weights_multiply() -> None:
    both = weights(EPSILON, [10, 900], min_snr_gamma=5, debiased_estimation_loss=True)
    min_snr, debiased = (
        weights(EPSILON, [10, 900], min_snr_gamma=5),
        weights(EPSILON, [10, 900], debiased_estimation_loss=True),
    )
    assert both == pytest.approx([a * b for a, b in zip(min_snr, debiased, strict=True)])


def test_flow_weightings() -> None:
    golden = MATH["flow_loss_weighting"]
    sigma = torch.tensor(golden["sigmas"], dtype=torch.float64)
    objective = RectifiedFlow(grid=lambda *_: None)
    for scheme, weights in golden["weights"].items():
        result = make_weighting(NoiseOptions(weighting_scheme=scheme), LossOptions())(
            Level(sigma * 1000, 1 - sigma, sigma), objective
        )
        assert result.tolist() == pytest.approx(weights, rel=1e-5), scheme


def test_weightings_are_finite_at_both_ends() -> None:
    level = RectifiedFlow(grid=lambda *_: None).level(torch.tensor([0.0, 1000.0]))
    for weighting in (sigma_sqrt, cosmap):
        assert weighting(level, RectifiedFlow(grid=lambda *_: None)).isfinite().all()
