"""Losses, their schedules and the weightings against the field's numbers and the papers' formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion.losses import SCHEDULES, make_loss
from sfumato.diffusion.objective import Level, Objective, RectifiedFlow, VariancePreserving
from sfumato.diffusion.weightings import make_weighting

MATH = json.loads((Path(__file__).parents[1] / "goldens" / "math.json").read_text())
EPSILON, V = VariancePreserving(), VariancePreserving(predicts="v")
ENDS_IN_NOISE = {"epsilon": VariancePreserving(zero_terminal_snr=True)}
ENDS_IN_NOISE["v"] = VariancePreserving(predicts="v", zero_terminal_snr=True)
FLOW = RectifiedFlow(grid=lambda *_: None)


def level(timesteps: list[int], objective: Objective = EPSILON) -> Level:
    return objective.level(torch.tensor(timesteps, dtype=torch.float32))


def weights(objective: Objective, timesteps: list[int], **options: Any) -> list[float]:
    weighting = make_weighting(NoiseOptions(), LossOptions(**options))
    return weighting(level(timesteps, objective), objective).tolist()


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("row", MATH["elementwise_loss"], ids=str)
def test_elementwise_losses(row: dict[str, Any]) -> None:
    options = LossOptions(loss_type=row["loss_type"], huber_schedule="constant", huber_c=row["huber_c"] or 0.1)
    found = make_loss(options)(torch.tensor([row["pred"]]), torch.tensor([row["target"]]), level([500]))
    assert found[0].tolist() == pytest.approx(row["loss"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("row", MATH["huber_threshold"], ids=str)
def test_thresholds(row: dict[str, Any]) -> None:
    """The reference leaves --huber_scale out of the snr schedule; here it acts on every schedule."""
    options = LossOptions(huber_schedule=row["schedule"], huber_c=row["huber_c"], huber_scale=row["huber_scale"])
    found = SCHEDULES.get(row["schedule"])(level(row["timesteps"]), options).tolist()
    left_out = row["huber_scale"] if row["schedule"] == "snr" else 1
    assert found == pytest.approx([each * left_out for each in row["threshold"]], rel=1e-5)


@pytest.mark.parametrize("row", MATH["scheduled_loss_mean_per_sample"], ids=str)
def test_scheduled_losses_depend_on_the_level(row: dict[str, Any]) -> None:
    options = LossOptions(
        loss_type=row["loss_type"], huber_schedule=row["schedule"], huber_c=row["huber_c"],
        huber_scale=row["huber_scale"],
    )  # fmt: skip
    at = level(row["timesteps"])
    d = torch.full((len(row["timesteps"]), 1), 0.7)
    found = make_loss(options)(d, torch.zeros_like(d), at)[:, 0]
    c = SCHEDULES.get(row["schedule"])(at, options)
    closed = 2 * ((0.49 + c**2).sqrt() - c) * (c if row["loss_type"] == "huber" else 1)
    torch.testing.assert_close(found.double(), closed, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", SCHEDULES.names)
def test_flows_have_every_schedule(kind: Any, schedule: Any) -> None:
    """Also where nothing of the image is left, and where there is no noise at all."""
    options = LossOptions(loss_type=kind, huber_schedule=schedule)
    at = level([0, 500, 1000], FLOW)
    d = torch.tensor([[0.0, 3.0]]).repeat(3, 1).requires_grad_()
    loss = make_loss(options)(d, torch.zeros(3, 2), at)
    loss.sum().backward()
    assert d.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(d.grad).all()
    snr = SCHEDULES.get("snr")(at, options).tolist()
    assert snr == pytest.approx([1.0, 0.9 / 4 + 0.1, 0.1])  # SNR infinite, 1, 0


# ---------------------------------------------------------------- weightings


@pytest.mark.parametrize("row", MATH["min_snr_weight"], ids=str)
def test_min_snr(row: dict[str, Any]) -> None:
    objective = V if row["v_prediction"] else EPSILON
    assert weights(objective, row["timesteps"], min_snr_gamma=row["gamma"]) == pytest.approx(row["weight"], rel=1e-5)


@pytest.mark.parametrize("row", MATH["debiased_weight"], ids=str)
def test_debiased(row: dict[str, Any]) -> None:
    found = weights(V if row["v_prediction"] else EPSILON, row["timesteps"], debiased_estimation_loss=True)
    assert found == pytest.approx(row["weight"], rel=1e-5)


def test_v_weighted_like_noise() -> None:
    row = MATH["scale_v_pred_loss_like_noise_pred"]
    found = weights(V, row["timesteps"], scale_v_pred_loss_like_noise_pred=True)
    assert found == pytest.approx(row["weight"], rel=1e-5)


@pytest.mark.parametrize("row", MATH["v_pred_like_loss"], ids=str)
def test_noise_with_a_share_of_v(row: dict[str, Any]) -> None:
    assert weights(EPSILON, row["timesteps"], v_pred_like_loss=row["value"]) == pytest.approx(row["weight"], rel=1e-5)


@pytest.mark.parametrize(("name", "key"), [("epsilon", "min_snr5_eps"), ("v", "min_snr5_v")])
def test_weights_know_of_zero_terminal_snr(name: str, key: str) -> None:
    """The reference takes SNR before it changes the schedule. At the end its formula is 0 / 0; the limit is 1, or 0."""
    golden = MATH["zero_terminal_snr"]
    found = weights(ENDS_IN_NOISE[name], golden["timesteps"], min_snr_gamma=5)
    wanted = golden["if_all_snr_were_taken_after_the_fix"][key]
    assert wanted[-1] in (None, 0)
    assert found[:-1] == pytest.approx(wanted[:-1], rel=1e-4)
    assert found[-1] == pytest.approx(1.0 if name == "epsilon" else 0.0, abs=1e-7)


@pytest.mark.parametrize(
    ("objective", "options", "limit"),
    [
        (ENDS_IN_NOISE["epsilon"], {"debiased_estimation_loss": True}, 0.0),  # 1 / sqrt(SNR): the sample tells nothing
        (ENDS_IN_NOISE["v"], {"debiased_estimation_loss": True}, 1.0),
        (ENDS_IN_NOISE["epsilon"], {"v_pred_like_loss": 0.5}, 1.0),
        (ENDS_IN_NOISE["v"], {"scale_v_pred_loss_like_noise_pred": True}, 0.0),
        (ENDS_IN_NOISE["epsilon"], {"soft_min_snr_gamma": 5}, 1.0),
        (ENDS_IN_NOISE["epsilon"], {"p2_gamma": 1.0}, 1.0),
        (ENDS_IN_NOISE["v"], {"p2_gamma": 1.0}, 0.0),
    ],
)
def test_weights_where_nothing_of_the_image_is_left(objective: Any, options: Any, limit: float) -> None:
    assert weights(objective, [999], **options) == pytest.approx([limit], abs=1e-6)


def closed_form(at: Level, w: Tensor) -> Tensor:
    """A weight of the image's error, on a velocity: x_0 = x_sigma - sigma v."""
    return w * at.sigma**2


def test_weights_of_the_image_carry_over_to_flows() -> None:
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
    one, other = (
        weights(EPSILON, [10, 900], min_snr_gamma=5),
        weights(EPSILON, [10, 900], debiased_estimation_loss=True),
    )
    assert both == pytest.approx([a * b for a, b in zip(one, other, strict=True)])
