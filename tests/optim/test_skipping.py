"""A step that is not to be taken leaves weights and state as they are, whoever decides it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sfumato.optim.skipping import skips_on_device, step_where

CASES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "AdamW": (torch.optim.AdamW, {"fused": True}, True),
    "Adam": (torch.optim.Adam, {"fused": True, "weight_decay": 0.1}, True),
    "AMSGrad": (torch.optim.AdamW, {"fused": True, "amsgrad": True}, True),
    "AdamW-foreach": (torch.optim.AdamW, {"foreach": True}, False),
    "SGD": (torch.optim.SGD, {"fused": True, "momentum": 0.9}, False),
    "Adagrad": (torch.optim.Adagrad, {}, False),
}


def take_steps(kind: str, *, gradients: list[float]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Weights and state after these steps; one whose gradient is not finite is not taken."""
    make, options, _ = CASES[kind]
    weight = nn.Parameter(torch.linspace(-1, 1, 5))
    optimizer = make([weight], lr=0.1, **options)
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        step_where(torch.isfinite(weight.grad.sum()), optimizer, optimizer.step)
    return weight.detach(), copy.deepcopy(dict(optimizer.state[weight]))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_it_is_as_if_the_step_had_not_been(kind: str, bad: float, place: int) -> None:
    """Also the first one, after which the state is new."""
    good = [1.0, -0.5, 0.25]
    weight, state = take_steps(kind, gradients=[*good[:place], bad, *good[place:]])
    expected, expected_state = take_steps(kind, gradients=good)
    assert torch.equal(weight, expected)
    assert {name: torch.as_tensor(value).tolist() for name, value in state.items() if value is not None} == {
        name: torch.as_tensor(value).tolist() for name, value in expected_state.items() if value is not None
    }


@pytest.mark.parametrize("kind", CASES)
def test_who_decides(kind: str) -> None:
    make, options, on_device = CASES[kind]
    optimizer = make([nn.Parameter(torch.ones(1))], lr=0.1, **options)
    assert skips_on_device(optimizer) == on_device
    asked: list[bool] = []
    step_where(torch.tensor(False), optimizer, lambda: asked.append(True))
    assert asked == [True] * on_device  # its kernels do nothing; otherwise it is not called
    assert "found_inf" not in vars(optimizer)


def test_on_a_device_that_nobody_has_tried_the_host_decides() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(1, device="meta"))]
    assert not skips_on_device(optimizer)


def test_a_class_made_of_adam_may_ignore_it() -> None:
    class Other(torch.optim.AdamW):
        """Its step might read no flag."""

    assert not skips_on_device(Other([nn.Parameter(torch.ones(1))], fused=True))
