"""Every schedule, step by step, against transformers' and diffusers' own; classes of torch, with exact resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from optim.helpers import TOTAL, Bench
from sfumato.config import OptimOptions
from sfumato.errors import UserError
from sfumato.formats.state import load_state, save_state
from sfumato.optim.optimizers import class_name, restore
from sfumato.optim.rates import Foreign, check_schedule, make_shape, shown_rates
from sfumato.optim.schedules import SCHEDULES

STEPS, WARMUP = 100, 13


def factors(rate: float = 1e-3, **options: Any) -> list[float]:
    """Our rates over a run, as shares of the first group's own."""
    bench = Bench(total=STEPS, learning_rate=rate, **options)
    found = []
    for step in range(STEPS):
        bench.rates.set(bench.optimizer, step)
        found.append(bench.optimizer.param_groups[0]["lr"] / rate)
    return found


def theirs(make: Any, rate: float = 1e-3, **arguments: Any) -> list[float]:
    """What a function of transformers or diffusers gives before each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = make(optimizer, **arguments)
    assert isinstance(scheduler, LambdaLR)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"] / rate)
        optimizer.step()
        scheduler.step()
    return found


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
    "cosine_with_min_lr 3": (  # the field halves the cycles
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
    assert set(choices) - set(SCHEDULES.names) == {"adafactor"}
    assert set(SCHEDULES.names) <= set(choices)


def test_polynomial_falls_to_the_same_rate_in_every_group() -> None:
    bench = Bench(rates=(1e-3, 1e-5), total=STEPS, lr_scheduler="polynomial")
    bench.rates.set(bench.optimizer, STEPS)
    assert [group["lr"] for group in bench.optimizer.param_groups] == pytest.approx([1e-7, 1e-7])


def test_schedule_free_keeps_its_rate() -> None:
    pytest.importorskip("schedulefree")
    assert set(factors(optimizer_type="AdamWScheduleFree", lr_scheduler="cosine", lr_warmup_steps=5)) == {1.0}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr_warmup_steps": 60, "lr_decay_steps": 41}, "(60) and --lr_decay_steps (41) do not fit into 100 steps"),
        ({"lr_scheduler": "polynomial", "rate": 1e-7}, "falls to a learning rate of 1e-07, and it starts at 1e-07"),
        ({"lr_scheduler": "piecewise_constant"}, "needs its steps and factors — as --lr_scheduler_args step_rules="),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:x,2"}},
            "needs its steps and factors",
        ),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 100, "lr_scheduler_args": {"decay_type": "lin"}},
            "there is no form 'lin' — did you mean 'linear'?",
        ),
        ({"lr_scheduler_args": {"lr_end": 1}}, "--lr_scheduler_args: constant does not take 'lr_end'"),
        ({"lr_scheduler_type": "StepLRR"}, "unknown --lr_scheduler_type 'StepLRR' — did you mean 'StepLR'?"),
        ({"lr_scheduler_type": "no.such"}, "--lr_scheduler_type no.such needs the module no, which is not there"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "ReduceLROnPlateau is no schedule over steps alone"),
        ({"lr_scheduler_type": "transformers.optimization.GreedyLR"}, "GreedyLR is no schedule over steps alone"),
        ({"lr_scheduler_type": "builtins.dict"}, "builtins.dict is no schedule over steps alone"),
        ({"lr_scheduler_type": "StepLR"}, "StepLR cannot be made of these arguments"),
        (
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"step_sise": 2}},
            "--lr_scheduler_args: StepLR does not take 'step_sise' — did you mean 'step_size'?",
        ),
        (
            {"lr_scheduler_type": "LambdaLR", "lr_scheduler_args": {"lr_lambda": "x"}},
            "LambdaLR cannot be made of these arguments",
        ),
    ],
)
def test_mistakes_are_one_line(options: Mapping[str, Any], told: str) -> None:
    with pytest.raises(UserError) as raised:
        factors(**options)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_can_be_told_before_there_are_weights() -> None:
    check_schedule(OptimOptions(), 5)
    check_schedule(OptimOptions(optimizer_type="AdaFactor", lr_scheduler="adafactor"), 5)
    check_schedule(OptimOptions(lr_scheduler_type="StepLR", lr_scheduler_args={"step_size": 2}), 5)
    for options in (
        {"lr_scheduler": "piecewise_constant"},
        {"lr_scheduler_args": {"gamma": 2}},
        {"lr_scheduler_type": "StepL"},
        {"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"gama": 2}},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 6},
    ):
        with pytest.raises(UserError):
            check_schedule(OptimOptions(**options), 5)


def test_shares_are_of_all_steps() -> None:
    shape = make_shape(OptimOptions(lr_warmup_steps=0.1, lr_decay_steps=0.25), 43)
    assert (shape.warmup, shape.decay) == (4, 10)


CLASSES = {
    "StepLR": {"step_size": 2, "gamma": 0.5},
    "MultiStepLR": {"milestones": (1, 4), "gamma": 0.1},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"start_factor": 0.1, "total_iters": 5},
    "PolynomialLR": {"total_iters": 6, "power": 2},
    "CosineAnnealingLR": {"T_max": 8, "eta_min": 1e-5},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "OneCycleLR": {"max_lr": 0.01, "total_steps": TOTAL},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 2},
    "torch.optim.lr_scheduler.ConstantLR": {"factor": 0.3, "total_iters": 4},
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_torch(name: str) -> None:
    """The rate of step n is the one after n calls of the scheduler's own step."""
    ours, other = (Bench(lr_scheduler_type=name, lr_scheduler_args=CLASSES[name]) for _ in range(2))
    kind = getattr(torch.optim.lr_scheduler, name.rpartition(".")[2])
    plain = Bench()
    scheduler = kind(plain.optimizer, **CLASSES[name])
    for step in range(TOTAL):
        ours.step(step)
        assert shown_rates(ours.optimizer) == shown_rates(plain.optimizer)
        plain.optimizer.step()
        if step + 1 < TOTAL:
            scheduler.step()
    assert isinstance(other.rates, Foreign)


@pytest.mark.parametrize("name", CLASSES)
def test_their_resume_is_exact(name: str, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": name, "lr_scheduler_args": CLASSES[name], "optimizer_type": "AdamW"}
    straight, first, second = Bench(**options), Bench(**options), Bench(**options)
    straight.steps(range(TOTAL))
    first.steps(range(3))
    state = {"optimizer": first.optimizer.state_dict(), "rates": first.rates.state_dict()}
    save_state(tmp_path / "state", state, {})
    loaded, _ = load_state(tmp_path / "state")
    second.module.load_state_dict(first.module.state_dict())
    restore(second.optimizer, loaded["optimizer"], class_name(first.optimizer))
    second.rates.load_state_dict(loaded["rates"])
    second.steps(range(3, TOTAL))
    assert shown_rates(straight.optimizer) == shown_rates(second.optimizer)
    assert all(torch.equal(one, other) for one, other in zip(straight.weights(), second.weights(), strict=True))


def test_resume_under_another_schedule(caplog: pytest.LogCaptureFixture) -> None:
    """A flat schedule has no state; a class goes on as it was, or says that it cannot."""
    step = {"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"step_size": 2}}
    first = Bench(**step)
    first.steps(range(3))
    Bench(**step).rates.load_state_dict(first.rates.state_dict())
    assert not caplog.text
    for changed in (Bench(**step, learning_rate=0.5), Bench(**step | {"lr_scheduler_args": {"step_size": 3}})):
        caplog.clear()
        changed.rates.load_state_dict(first.rates.state_dict())
        assert "StepLR goes on as it was saved" in caplog.text
    exponential = Bench(lr_scheduler_type="ExponentialLR", lr_scheduler_args={"gamma": 0.5})
    with pytest.raises(UserError, match="saved with another schedule than --lr_scheduler_type ExponentialLR"):
        exponential.rates.load_state_dict(first.rates.state_dict())
    with pytest.raises(UserError, match="saved with another schedule"):
        first.rates.load_state_dict(Bench().rates.state_dict())
    Bench().rates.load_state_dict(first.rates.state_dict())


def test_the_cosine_is_the_closed_form() -> None:
    ours = factors(lr_scheduler="cosine")
    assert ours == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / STEPS) for step in range(STEPS)])
