"""Every flat schedule, step by step, against transformers' and diffusers' own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from optim.helpers import STEPS, Bench, factors
from sfumato.config import OptimOptions
from sfumato.errors import UserError
from sfumato.optim.schedules import LR_SCHEDULES

WARMUP = 13


def theirs(make: Any, lr: float = 1e-3, **arguments: Any) -> list[float]:
    """What a function of transformers or diffusers gives before each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer, **arguments)
    assert isinstance(scheduler, LambdaLR)
    values: list[float] = []
    for _ in range(STEPS):
        values.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()
        scheduler.step()
    return values


def close(ours: list[float], others: list[float]) -> bool:
    return ours == pytest.approx(others, rel=1e-11, abs=1e-13)


BOTH = {"constant": {}, "constant_with_warmup": {}, "linear": {}, "cosine": {}, "polynomial": {"power": 1.7}}
BOTH |= {"cosine_with_restarts": {"num_cycles": 3}}


@pytest.mark.parametrize("warmup", [0, WARMUP, "13%"])
@pytest.mark.parametrize("name", BOTH)
def test_equal_to_diffusers(name: str, warmup: Any) -> None:
    from diffusers.optimization import get_scheduler

    steps = 0 if name == "constant" else warmup
    ours = factors(
        lr_scheduler=name,
        lr_warmup_steps=0.13 if steps == "13%" else steps,
        lr_scheduler_num_cycles=BOTH[name].get("num_cycles", 1),
        lr_scheduler_power=BOTH[name].get("power", 1.0),
    )
    given = {"num_warmup_steps": WARMUP if steps == "13%" else steps, "num_training_steps": STEPS, **BOTH[name]}
    assert close(ours, theirs(lambda optimizer, **more: get_scheduler(name, optimizer, **more), **given))


TRANSFORMERS = {  # our options, the function, its arguments
    "linear": ({}, "get_linear_schedule_with_warmup", {}),
    "cosine": ({}, "get_cosine_schedule_with_warmup", {}),
    "cosine_with_restarts": (
        {"lr_scheduler_num_cycles": 4},
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        {"num_cycles": 4},
    ),
    "polynomial": (
        {"lr_scheduler_power": 0.5, "lr_scheduler_args": {"lr_end": 2e-4}},
        "get_polynomial_decay_schedule_with_warmup",
        {"power": 0.5, "lr_end": 2e-4},
    ),
    "inverse_sqrt": ({}, "get_inverse_sqrt_schedule", {}),
    "inverse_sqrt 7": ({"lr_scheduler_timescale": 7}, "get_inverse_sqrt_schedule", {"timescale": 7}),
    "cosine_with_min_lr": (
        {"lr_scheduler_min_lr_ratio": 0.1},
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"min_lr_rate": 0.1, "num_cycles": 0.5},
    ),
    "cosine_with_min_lr 3": (  # sd-scripts halves the cycles
        {"lr_scheduler_min_lr_ratio": 0.2, "lr_scheduler_num_cycles": 3},
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"min_lr_rate": 0.2, "num_cycles": 1.5},
    ),
    "warmup_stable_decay": (
        {"lr_decay_steps": 30},
        "get_wsd_schedule",
        {"num_decay_steps": 30, "num_cycles": 0.5},
    ),
    "warmup_stable_decay 3": (
        {"lr_decay_steps": 0.3, "lr_scheduler_min_lr_ratio": 0.05, "lr_scheduler_num_cycles": 3},
        "get_wsd_schedule",
        {"num_decay_steps": 30, "min_lr_ratio": 0.05, "num_cycles": 1.5},
    ),
    "warmup_stable_decay forms": (
        {
            "lr_decay_steps": 30,
            "lr_scheduler_min_lr_ratio": 0.05,
            "lr_scheduler_args": {"warmup_type": "1-sqrt", "decay_type": "linear"},
        },
        "get_wsd_schedule",
        {"num_decay_steps": 30, "min_lr_ratio": 0.05, "warmup_type": "1-sqrt", "decay_type": "linear"},
    ),
    "warmup_stable_decay roots": (
        {"lr_decay_steps": 87, "lr_scheduler_args": {"warmup_type": "cosine", "decay_type": "1-sqrt"}},
        "get_wsd_schedule",
        {"num_decay_steps": 87, "warmup_type": "cosine", "decay_type": "1-sqrt"},
    ),
    "warmup_stable_decay level": ({}, "get_wsd_schedule", {"num_decay_steps": 0}),
}


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_equal_to_transformers(case: str, warmup: int) -> None:
    from transformers import optimization

    options, function, arguments = TRANSFORMERS[case]
    given: dict[str, Any] = {"num_warmup_steps": warmup, **arguments}
    if function != "get_inverse_sqrt_schedule":
        given["num_training_steps"] = STEPS
    ours = factors(lr_scheduler=case.partition(" ")[0], lr_warmup_steps=warmup, **options)
    assert close(ours, theirs(getattr(optimization, function), **given))


def test_piecewise_constant_is_that_of_diffusers() -> None:
    from diffusers.optimization import get_piecewise_constant_schedule

    rules = "1:10,0.1:20,0.01:30,0.005"
    ours = factors(lr_scheduler="piecewise_constant", lr_scheduler_args={"step_rules": rules})
    assert close(ours, theirs(get_piecewise_constant_schedule, step_rules=rules))
    assert set(ours) == {1, 0.1, 0.01, 0.005}


def test_every_schedule_of_the_option_is_there() -> None:
    """The one that is not is AdaFactor's own, which no schedule moves."""
    choices = OptimOptions.model_fields["lr_scheduler"].annotation.__args__
    assert set(choices) - set(LR_SCHEDULES.names) == {"adafactor"}
    assert set(LR_SCHEDULES.names) <= set(choices)


def test_polynomial_decays_to_the_same_learning_rate_in_every_group() -> None:
    bench = Bench(lrs=(1e-3, 1e-5), total=STEPS, lr_scheduler="polynomial")
    bench.schedule.set(bench.optimizer, STEPS)
    assert [group["lr"] for group in bench.optimizer.param_groups] == pytest.approx([1e-7, 1e-7])


MISTAKES = [  # options, the code, values in the text
    ({"lr_scheduler": "polynomial", "lr": 1e-7}, "polynomial-end-not-lower", ["1e-07"]),
    ({"lr_scheduler": "piecewise_constant"}, "step-rules-invalid", ["--lr_scheduler_args step_rules="]),
    (
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:x,2"}},
        "step-rules-invalid",
        ["1:x,2"],
    ),
    (
        {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 100, "lr_scheduler_args": {"decay_type": "lin"}},
        "decay-type-unknown",
        ["'lin'", "'linear'"],
    ),
]


@pytest.mark.parametrize(("options", "code", "values"), MISTAKES)
def test_mistakes(options: Mapping[str, Any], code: str, values: list[str]) -> None:
    with pytest.raises(UserError) as error:
        factors(**options)
    assert error.value.code == code
    assert all(value in str(error.value) for value in values)
    assert "\n" not in str(error.value)


def test_the_cosine_is_the_closed_form() -> None:
    ours = factors(lr_scheduler="cosine")
    assert ours == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / STEPS) for step in range(STEPS)])
