"""The schedule of a run: named by the options, classes of torch among them, with exact resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.helpers import STEPS, TOTAL, Bench, factors
from sfumato.config import OptimOptions
from sfumato.errors import Problems, UserError
from sfumato.formats.state import load_state, save_state
from sfumato.optim.check import check_optimizer
from sfumato.optim.lr_schedule import TorchSchedule, check_schedule, current_learning_rates, make_schedule_shape
from sfumato.optim.optimizers import class_name, restore_optimizer


def test_schedule_free_keeps_its_learning_rate() -> None:
    pytest.importorskip("schedulefree")
    assert set(factors(optimizer_type="AdamWScheduleFree", lr_scheduler="cosine", lr_warmup_steps=5)) == {1.0}


MISTAKES = [  # options, the code, values in the text
    ({"lr_scheduler_type": "StepLRR"}, "class-name-unknown", ["--lr_scheduler_type 'StepLRR'", "'StepLR'"]),
    ({"lr_scheduler_type": "no.such"}, "class-module-missing", ["--lr_scheduler_type no.such"]),
    ({"lr_scheduler_type": "ReduceLROnPlateau"}, "scheduler-not-step-based", ["ReduceLROnPlateau"]),
    ({"lr_scheduler_type": "transformers.optimization.GreedyLR"}, "scheduler-not-step-based", ["GreedyLR"]),
    ({"lr_scheduler_type": "builtins.dict"}, "scheduler-not-step-based", ["builtins.dict"]),
    ({"lr_scheduler_type": "StepLR"}, "scheduler-arguments-refused", ["StepLR", "step_size"]),
    (
        {"lr_scheduler_type": "LambdaLR", "lr_scheduler_args": {"lr_lambda": "x"}},
        "scheduler-arguments-refused",
        ["LambdaLR", "--lr_scheduler_args"],
    ),
]


@pytest.mark.parametrize(("options", "code", "values"), MISTAKES)
def test_mistakes(options: Mapping[str, Any], code: str, values: list[str]) -> None:
    with pytest.raises(UserError) as error:
        factors(**options)
    assert error.value.code == code
    assert all(value in str(error.value) for value in values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"lr_scheduler_args": {"lr_end": 1}}, ["--lr_scheduler_args: constant", "'lr_end'"]),
        (
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"step_sise": 2}},
            ["--lr_scheduler_args: StepLR", "'step_sise'", "'step_size'"],
        ),
    ],
)
def test_an_unknown_argument_is_named(options: Mapping[str, Any], values: list[str]) -> None:
    with pytest.raises(UserError) as error:
        factors(**options)
    assert all(value in str(error.value) for value in values)


def test_check_needs_no_weights() -> None:
    check_schedule(OptimOptions(), 5)
    check_schedule(OptimOptions(optimizer_type="AdaFactor", lr_scheduler="adafactor"), 5)
    check_schedule(OptimOptions(lr_scheduler_type="StepLR", lr_scheduler_args={"step_size": 2}), 5)
    for options, code in (
        ({"lr_scheduler": "piecewise_constant"}, "step-rules-invalid"),
        ({"lr_scheduler_type": "StepL"}, "class-name-unknown"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": {"lr_end": "x"}}, "schedule-arguments-refused"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 2, "lr_scheduler_args": {"decay_type": "no"}},
            "decay-type-unknown",
        ),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 2, "lr_scheduler_args": {"decay_type": 5}},
            "schedule-arguments-refused",
        ),
    ):
        with pytest.raises(UserError) as error:
            check_schedule(OptimOptions(**options), 5)
        assert error.value.code == code
    for options in (
        {"lr_scheduler_args": {"gamma": 2}},
        {"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"gama": 2}},
    ):
        with pytest.raises(UserError, match="--lr_scheduler_args"):
            check_schedule(OptimOptions(**options), 5)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"step_size": "x"}, "scheduler-fails-later"),
        ({"step_size": 2, "gamma": "x"}, "scheduler-fails-later"),
        ({}, "scheduler-arguments-refused"),
        ({"step_size": 2, "gamma": 0.5}, None),
    ],
)
def test_a_class_is_tried_before_there_are_weights(arguments: dict[str, Any], code: str | None) -> None:
    optim = OptimOptions(lr_scheduler_type="StepLR", lr_scheduler_args=arguments)
    problems = Problems()
    check_optimizer(optim, 5, problems)
    assert [error.code for error in problems.found] == ([code] if code else [])


@pytest.mark.parametrize(("learning_rates", "count"), [((1e-4, 1e-6), 1), ((1e-4,), 0), ((1e-6, 1e-7), 1), ((), 0)])
def test_an_end_above_the_start_is_found_before_there_are_weights(
    learning_rates: tuple[float, ...], count: int
) -> None:
    optim = OptimOptions(lr_scheduler="polynomial", lr_scheduler_args={"lr_end": 1e-5})
    problems = Problems()
    check_optimizer(optim, 5, problems, learning_rates)
    assert [error.code for error in problems.found] == ["polynomial-end-not-lower"] * count


def test_a_class_that_ends_before_the_run_is_refused() -> None:
    arguments = {"max_lr": 0.01, "total_steps": 4}
    problems = Problems()
    check_optimizer(OptimOptions(lr_scheduler_type="OneCycleLR", lr_scheduler_args=arguments), 10, problems)
    assert [error.code for error in problems.found] == ["scheduler-fails-later"]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 6}, 1),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 5}, 0),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 5, "lr_decay_steps": 5}, 0),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 3, "lr_decay_steps": 3}, 1),
        ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 6}, 1),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 2, "lr_decay_steps": 3}, 0),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"step_size": 2}}, 0),
    ],
)
def test_a_warmup_longer_than_the_run_is_noted(options: dict[str, Any], count: int) -> None:
    problems = Problems()
    assert len(check_optimizer(OptimOptions(**options), 5, problems)) == count
    assert not problems.found


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"])
def test_a_run_shorter_than_its_warmup_stays_in_it(name: str) -> None:
    lrs = factors(lr_scheduler=name, lr_warmup_steps=2 * STEPS)
    assert lrs == pytest.approx([step / (2 * STEPS) for step in range(STEPS)])


def test_shares_are_of_all_steps() -> None:
    shape = make_schedule_shape(OptimOptions(lr_warmup_steps=0.1, lr_decay_steps=0.25), 43)
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
    """The learning rate of step n is the one after n calls of the scheduler's own step."""
    ours, other = (Bench(lr_scheduler_type=name, lr_scheduler_args=CLASSES[name]) for _ in range(2))
    kind = getattr(torch.optim.lr_scheduler, name.rpartition(".")[2])
    plain = Bench()
    scheduler = kind(plain.optimizer, **CLASSES[name])
    for step in range(TOTAL):
        ours.step(step)
        assert current_learning_rates(ours.optimizer) == current_learning_rates(plain.optimizer)
        plain.optimizer.step()
        if step + 1 < TOTAL:
            scheduler.step()
    assert isinstance(other.schedule, TorchSchedule)


@pytest.mark.parametrize("name", CLASSES)
def test_their_resume_is_exact(name: str, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": name, "lr_scheduler_args": CLASSES[name], "optimizer_type": "AdamW"}
    straight, first, second = Bench(**options), Bench(**options), Bench(**options)
    straight.steps(range(TOTAL))
    first.steps(range(3))
    state = {"optimizer": first.optimizer.state_dict(), "rates": first.schedule.state_dict()}
    save_state(tmp_path / "state", state, {})
    loaded, _ = load_state(tmp_path / "state")
    second.module.load_state_dict(first.module.state_dict())
    restore_optimizer(second.optimizer, loaded["optimizer"], class_name(first.optimizer))
    second.schedule.load_state_dict(loaded["rates"])
    second.steps(range(3, TOTAL))
    assert current_learning_rates(straight.optimizer) == current_learning_rates(second.optimizer)
    assert all(torch.equal(one, other) for one, other in zip(straight.weights(), second.weights(), strict=True))


def test_resume_under_another_schedule(caplog: pytest.LogCaptureFixture) -> None:
    """A flat schedule has no state; a class continues as saved, or raises."""
    step = {"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"step_size": 2}}
    first = Bench(**step)
    first.steps(range(3))
    Bench(**step).schedule.load_state_dict(first.schedule.state_dict())
    assert not caplog.text
    for changed in (Bench(**step, learning_rate=0.5), Bench(**step | {"lr_scheduler_args": {"step_size": 3}})):
        caplog.clear()
        changed.schedule.load_state_dict(first.schedule.state_dict())
        assert "StepLR" in caplog.text
    exponential = Bench(lr_scheduler_type="ExponentialLR", lr_scheduler_args={"gamma": 0.5})
    for schedule, saved in ((exponential.schedule, first.schedule), (first.schedule, Bench().schedule)):
        with pytest.raises(UserError) as error:
            schedule.load_state_dict(saved.state_dict())
        assert error.value.code == "resume-schedule-mismatch"
    Bench().schedule.load_state_dict(first.schedule.state_dict())
