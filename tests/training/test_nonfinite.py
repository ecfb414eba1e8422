"""Nothing that is not finite reaches the weights, and what was asked to train does."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sfumato.train
from families.toys import ToyShelf
from sfumato.config import load_config
from sfumato.data.loader import Step
from sfumato.errors import UserError
from sfumato.train import train_step
from sfumato.training.follow import follow_step
from sfumato.training.nonfinite import PATIENCE, NonfiniteGuard, TrainingCheck, record_nonfinite_outputs
from sfumato.training.outcomes import StepResult
from sfumato.training.run import Run
from sfumato.training.setup_run import build_run
from sfumato.training.step_owner import judge_step
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, read_metrics, read_weights

NAN = float("nan")
Toy = Mapping[str, Path]


@pytest.fixture(scope="module")
def toy(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def opened(toy: Toy, images: Path, output: Path, **options: Any) -> Run:
    return build_toy_run(toy, images, output, network_train_unet_only=True, **options)


def spoil(run: Run, calls: set[int]) -> None:
    """Some calls of one module of the denoiser give NaN."""
    module = run.model.denoiser.get_submodule("mid_block.resnets.0")
    count = 0

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return output * NAN if count in calls else output

    module.register_forward_hook(hook)


def follow(run: Run, step: Step) -> StepResult:
    """A step as the loop takes it."""
    result = train_step(run, step)
    run.complete_step(step.index + 1)
    follow_step(run, step, result, {})
    return result


def equal_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])) for name in first)


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.method.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["AdamW", "SGDNesterov"])
def test_a_nonfinite_step_is_skipped_and_diagnosed(
    toy: Toy, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    """By the optimizer's own kernel or by the host; told once the next step is launched."""
    run = opened(toy, images, tmp_path, optimizer_type=optimizer)
    spoil(run, {2, 4})  # the second step, and the same when it is explained after the third
    steps = run.loader.steps(0)
    follow(run, next(steps))
    before, state = trained(run), copy.deepcopy(run.optimizer.state_dict()["state"])
    taken = follow(run, next(steps))
    assert not torch.isfinite(taken.loss)
    assert equal_tensors(trained(run), before)
    assert all(equal_values(kept, state[number]) for number, kept in run.optimizer.state_dict()["state"].items())
    assert "skipped" not in capsys.readouterr().err
    third = next(steps)
    assert torch.isfinite(follow(run, third).loss)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    planned = next(run.loader.sampler.steps(1))
    name = Path(planned.batches[0].samples[0].item.image.path).name
    assert "step 2 skipped" in line
    assert name in line
    assert "the first module with such an output is denoiser.mid_block.resnets.0" in line
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained(run).items())
    steps.close()
    with run.metrics, run.output_lock:
        pass  # closes its files
    assert [row["loss/current"] is None for row in read_metrics(tmp_path)] == [False, True, False]


def test_a_first_step_that_is_skipped_leaves_no_trace(toy: Toy, images: Path, tmp_path: Path) -> None:
    """The optimizer counts from 0 again: two runs, of which one begins with a bad step, take the same second step."""
    found = []
    for spoiled in (set[int](), {1}):
        run = opened(toy, images, tmp_path / str(len(spoiled)))
        spoil(run, spoiled)
        if spoiled:
            train_step(run, next(run.loader.steps(0)))
        train_step(run, next(run.loader.steps(1)))
        found.append(trained(run))
        with run.metrics, run.output_lock:
            pass
    assert equal_tensors(*found)


@pytest.mark.full
def test_several_in_a_row_end_the_run_with_a_good_state(
    toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*given: Any) -> Run | None:
        run = build_run(*given)
        assert run is not None
        if run.start.step == 0:
            spoil(run, set(range(3, 100)))
        return run

    monkeypatch.setattr(sfumato.train, "build_run", spoiled)
    options: dict[str, Any] = {"network_train_unet_only": True, "max_bad_steps": 2, "max_train_steps": 8}
    with pytest.raises(UserError) as caught:
        sfumato.train.train(load_config(make_arguments(toy, images, tmp_path, **options)))
    folder = tmp_path / "lora-step00000005-state"  # known a step late
    assert caught.value.code == "training-nonfinite"
    assert str(folder) in str(caught.value)
    sfumato.train.train(load_config(make_arguments(toy, images, tmp_path, resume=folder, **options)))
    assert all(torch.isfinite(tensor).all() for tensor in read_weights(tmp_path).values())
    found = [row["loss/average"] for row in read_metrics(tmp_path)]
    assert all(value == value for value in found)


@pytest.mark.full
def test_a_last_step_that_is_skipped_is_told(
    toy: Toy, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*given: Any) -> Run | None:
        run = build_run(*given)
        assert run is not None
        spoil(run, {2, 3})
        return run

    monkeypatch.setattr(sfumato.train, "build_run", spoiled)
    options: dict[str, Any] = {"network_train_unet_only": True, "max_train_steps": 2}
    sfumato.train.train(load_config(make_arguments(toy, images, tmp_path, **options)))
    assert "step 2 skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "taken", "sound"),
    [
        (1.0, 1.0, 1.0, True, True),
        (1.0, math.inf, 65536.0, False, True),  # nothing to tell of: the scaler lowers its scale
        (1.0, math.inf, 1.0, False, False),
        (math.inf, 1.0, 65536.0, False, False),
        (NAN, 1.0, 1.0, False, False),
        (1.0, NAN, 1.0, False, False),
        (math.inf, -math.inf, 1.0, False, False),
    ],
)
def test_what_is_skipped_and_what_is_told(loss: float, norm: float, scale: float, taken: bool, sound: bool) -> None:
    verdict = judge_step(torch.tensor(loss), torch.tensor(norm), torch.tensor(scale))
    assert (bool(verdict.finite), bool(verdict.sound)) == (taken, sound)


def test_skipped_steps_in_a_row_are_counted() -> None:
    guard, found = NonfiniteGuard(limit=2), []
    for sound in (False, True, False, False):
        guard.count(sound=sound)
        found.append(guard.exhausted)
    assert found == [False, False, False, True]


# ---------------------------------------------------------------- the proof that it trains


def optimizer_of(**groups: tuple[nn.Parameter, float]) -> torch.optim.Optimizer:
    rows = [{"params": [parameter], "lr": rate, "name": name} for name, (parameter, rate) in groups.items()]
    return torch.optim.SGD(rows)


def steps(optimizer: torch.optim.Optimizer, gradients: Mapping[nn.Parameter, float], count: int) -> TrainingCheck:
    proof = TrainingCheck(optimizer)
    for _ in range(count):
        for parameter, value in gradients.items():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step()
        proof.note(proof.measure())
    return proof


def test_groups_that_move_are_proven() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(first=(first, 0.1), second=(second, 0.1))
    assert steps(optimizer, {first: 1.0, second: -1.0}, 1).complete


def test_a_group_without_gradient_is_named() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(first=(first, 0.1), second=(second, 0.1))
    steps(optimizer, {first: 1.0}, PATIENCE - 1)
    with pytest.raises(UserError, match=r"second .*10 steps") as caught:
        steps(optimizer, {first: 1.0}, PATIENCE)
    assert caught.value.code == "trained-part-without-gradient"


def test_a_gradient_of_zeros_is_none() -> None:
    first = nn.Parameter(torch.ones(3))
    with pytest.raises(UserError) as caught:
        steps(optimizer_of(first=(first, 0.1)), {first: 0.0}, PATIENCE)
    assert caught.value.code == "trained-part-without-gradient"


def test_updates_that_the_precision_swallows_are_found() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(UserError) as caught:
        steps(optimizer_of(weight=(weight, 1e-6)), {weight: 1.0}, PATIENCE)
    assert caught.value.code == "trained-part-unchanged"


def test_a_rate_of_zero_is_waited_for() -> None:
    weight = nn.Parameter(torch.ones(3))
    assert not steps(optimizer_of(weight=(weight, 0.0)), {weight: 1.0}, 3 * PATIENCE).complete


def test_the_first_bad_module_is_the_first_that_ran() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].bias.fill_(float("inf"))
    with record_nonfinite_outputs({"net": net}) as found:
        net(torch.ones(1, 2))
    assert found[0] == "net.0"
    with record_nonfinite_outputs({"net": net[:0]}) as found:
        net(torch.ones(1, 2))
    assert found == []
