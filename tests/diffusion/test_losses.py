"""Loss functions and Huber schedules against sd-scripts' numbers and the papers' formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.config import LossOptions
from sfumato.diffusion.losses import HUBER_SCHEDULES, make_loss
from sfumato.diffusion.objective import Level, Objective, RectifiedFlow, VariancePreserving

MATH = json.loads((Path(__file__).parents[1] / "goldens" / "math.json").read_text())
EPSILON = VariancePreserving()
FLOW = RectifiedFlow(grid=lambda *_: None)


def level(timesteps: list[int], objective: Objective = EPSILON) -> Level:
    return objective.level(torch.tensor(timesteps, dtype=torch.float32))


@pytest.mark.parametrize("row", MATH["elementwise_loss"], ids=str)
def test_elementwise_losses(row: dict[str, Any]) -> None:
    options = LossOptions(loss_type=row["loss_type"], huber_schedule="constant", huber_c=row["huber_c"] or 0.1)
    values = make_loss(options)(torch.tensor([row["pred"]]), torch.tensor([row["target"]]), level([500]))
    assert values[0].tolist() == pytest.approx(row["loss"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("row", MATH["huber_threshold"], ids=str)
def test_thresholds(row: dict[str, Any]) -> None:
    """The reference ignores --huber_scale in the snr schedule; here it acts on every schedule."""
    options = LossOptions(huber_schedule=row["schedule"], huber_c=row["huber_c"], huber_scale=row["huber_scale"])
    values = HUBER_SCHEDULES.get(row["schedule"])(level(row["timesteps"]), options).tolist()
    omitted = row["huber_scale"] if row["schedule"] == "snr" else 1
    assert values == pytest.approx([value * omitted for value in row["threshold"]], rel=1e-5)


@pytest.mark.parametrize("row", MATH["scheduled_loss_mean_per_sample"], ids=str)
def test_scheduled_losses_depend_on_the_level(row: dict[str, Any]) -> None:
    options = LossOptions(
        loss_type=row["loss_type"], huber_schedule=row["schedule"], huber_c=row["huber_c"],
        huber_scale=row["huber_scale"],
    )  # fmt: skip
    at = level(row["timesteps"])
    d = torch.full((len(row["timesteps"]), 1), 0.7)
    values = make_loss(options)(d, torch.zeros_like(d), at)[:, 0]
    c = HUBER_SCHEDULES.get(row["schedule"])(at, options)
    closed = 2 * ((0.49 + c**2).sqrt() - c) * (c if row["loss_type"] == "huber" else 1)
    torch.testing.assert_close(values.double(), closed, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", HUBER_SCHEDULES.names)
def test_flows_have_every_schedule(kind: Any, schedule: Any) -> None:
    """Also at SNR 0 and infinity."""
    options = LossOptions(loss_type=kind, huber_schedule=schedule)
    at = level([0, 500, 1000], FLOW)
    d = torch.tensor([[0.0, 3.0]]).repeat(3, 1).requires_grad_()
    loss = make_loss(options)(d, torch.zeros(3, 2), at)
    loss.sum().backward()
    assert d.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(d.grad).all()
    snr = HUBER_SCHEDULES.get("snr")(at, options).tolist()
    assert snr == pytest.approx([1.0, 0.9 / 4 + 0.1, 0.1])  # SNR infinite, 1, 0
