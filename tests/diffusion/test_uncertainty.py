"""The learned weight of noise levels: against numpy, its known optimum, and training that starts as usual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from families.toys import ToyShelf
from sfumato.diffusion.objective import Level, RectifiedFlow, VariancePreserving
from sfumato.diffusion.uncertainty import CHANNELS, Uncertainty
from sfumato.errors import UserError
from sfumato.formats.state import load_state
from sfumato.train import train_step
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy
from warm_python import run_ranks

ROOT = Path(__file__).parents[2]
FLOW = RectifiedFlow(grid=lambda *_: None)


def learned(seed: int = 1) -> Uncertainty:
    """With weights as they might be after a while."""
    result = Uncertainty(torch.Generator().manual_seed(seed))
    result.weights.data.copy_(torch.randn(CHANNELS, generator=torch.Generator().manual_seed(2)))
    return result


@pytest.mark.parametrize("objective", [VariancePreserving(), FLOW])
def test_it_is_the_formula(objective: Any) -> None:
    """L / e^u + u, u the mean of sqrt(2) cos(2 pi (f c + p)) times sqrt(n) w, c = ln(sigma / alpha) / 4."""
    level = objective.level(torch.tensor([1.0, 10.0, 300.0, 700.0, 999.0]))
    module, loss = learned(), torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0])
    state = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
    c = np.log((level.sigma / level.alpha).numpy()) / 4
    waves = np.sqrt(2) * np.cos(np.outer(c, state["frequencies"]) + state["phases"])
    u = waves @ state["weights"] / np.sqrt(CHANNELS)
    torch.testing.assert_close(module.u(level), torch.tensor(u, dtype=torch.float32), rtol=1e-4, atol=1e-4)
    expected = loss.double().numpy() / np.exp(u) + u
    result = module(loss, level)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-4)
    slopes = torch.autograd.grad(result.sum(), module.weights)[0]  # d/dw = (1 - L / e^u) waves / sqrt(n)
    expected = ((1 - loss.double().numpy() / np.exp(u)) @ waves) / np.sqrt(CHANNELS)
    torch.testing.assert_close(slopes, torch.tensor(expected, dtype=torch.float32), rtol=1e-3, atol=1e-3)


def test_frequencies_are_normal_and_phases_uniform() -> None:
    draws = [Uncertainty(torch.Generator().manual_seed(seed)) for seed in range(50)]
    frequencies = torch.cat([each.frequencies for each in draws]) / (2 * torch.pi)
    phases = torch.cat([each.phases for each in draws]) / (2 * torch.pi)
    assert float(frequencies.mean()) == pytest.approx(0, abs=0.05)
    assert float(frequencies.std()) == pytest.approx(1, abs=0.05)
    assert (float(phases.min()), float(phases.max())) == pytest.approx((0, 1), abs=0.01)
    assert float(phases.std()) == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("objective", [VariancePreserving(zero_terminal_snr=True), FLOW])
def test_it_is_initially_one_and_finite_everywhere(objective: Any) -> None:
    ends = objective.level(torch.tensor([0.0, 999.0]) if objective.predicts == "epsilon" else torch.tensor([0.0, 1e3]))
    loss = torch.tensor([0.25, 4.0])
    assert torch.equal(Uncertainty(torch.Generator().manual_seed(1))(loss, ends), loss)
    assert learned()(loss, ends).isfinite().all()


def test_it_is_float32_under_autocast() -> None:
    level = FLOW.level(torch.tensor([100.0, 500.0]))
    module = learned()
    with torch.autocast("cpu", torch.bfloat16):
        result = module(torch.tensor([0.1, 2.0]), level)
    assert torch.equal(result, module(torch.tensor([0.1, 2.0]), level))


def test_the_best_u_is_the_logarithm_of_the_mean_loss() -> None:
    """Noisy losses whose mean is known at each level; the gradient's weight 1 / e^u then makes all levels equal."""
    module = Uncertainty(torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    draw = torch.Generator().manual_seed(3)

    def mean(level: Level) -> Tensor:
        return (0.02 + level.sigma**2).float()

    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 400)
        level = FLOW.level(torch.rand(64, generator=draw) * 960 + 20)
        loss = mean(level) * -torch.rand(64, generator=draw).clamp(min=1e-6).log()  # exponential, mean 1
        optimizer.zero_grad()
        module(loss, level).mean().backward()
        optimizer.step()
    level = FLOW.level(torch.linspace(40, 960, 24))
    with torch.no_grad():
        assert (module.u(level) - mean(level).log()).abs().mean() < 0.15


# ---------------------------------------------------------------- training


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


LEARNED = {"uncertainty_weighting": True, "network_train_unet_only": True}


@pytest.mark.full
def test_the_first_step_is_that_of_unweighted_training(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """The first step is the same to the bit, clipped by the same norm; the weight itself learns from it."""
    toy = toy_shelf.paths("sd")
    runs = [
        build_toy_run(toy, images, tmp_path / str(number), network_train_unet_only=True, max_grad_norm=0.01, **options)
        for number, options in enumerate(({}, {"uncertainty_weighting": True, "optimizer_args": "weight_decay=0.5"}))
    ]
    plain, learning = (run.parameters for run in runs)
    norms = [train_step(run, next(run.loader.steps(0))).grad_norm for run in runs]
    assert norms[0] == norms[1]
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(plain, learning, strict=True))
    uncertainty = runs[1].context.recipe.uncertainty
    assert uncertainty is not None
    assert 0.001 < uncertainty.weights.abs().max() < 0.02
    assert [group["name"] for group in runs[1].optimizer.param_groups] == ["denoiser", "uncertainty"]
    assert [group["weight_decay"] for group in runs[1].optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"train_batch_size": 2},
        pytest.param({"mixed_precision": "bf16", "full_bf16": True, "ema_decay": 0.9}, marks=pytest.mark.full),
        pytest.param({"mixed_precision": "fp16", "uncertainty_lr": 0.1}, marks=pytest.mark.full),
        pytest.param({"method": "full", "network_dim": None, "network_train_unet_only": None}, marks=pytest.mark.full),
    ],
)
@pytest.mark.full
def test_resume_is_exact(toy_shelf: ToyShelf, images: Path, tmp_path: Path, options: dict) -> None:
    toy, common = toy_shelf.paths("sd"), {**LEARNED, "max_train_steps": 4, "learning_rate": "1e-4", **options}
    straight = train_toy(toy, images, tmp_path / "straight", **common, save_every_n_steps=2, save_state=True)
    again = train_toy(
        toy, images, tmp_path / "again", **common, save_state=True, resume=straight / "lora-step00000002-state"
    )
    assert equal_tensors(read_weights(straight), read_weights(again))
    assert read_metrics(straight)[2:] == read_metrics(again)
    first, second = (load_state(folder / "lora-state")[0]["uncertainty"] for folder in (straight, again))
    assert equal_tensors(first, second)
    assert first["weights"].any()
    assert first["weights"].dtype == torch.float32
    assert not any("uncertainty" in name for name in read_weights(straight))


@pytest.mark.full
def test_a_state_of_another_loss_is_refused(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    toy = toy_shelf.paths("sd")
    train_toy(toy, images, tmp_path, save_state=True, max_train_steps=1, network_train_unet_only=True)
    with pytest.raises(UserError) as error:
        train_toy(toy, images, tmp_path, resume=tmp_path, **LEARNED)
    assert error.value.code == "resume-uncertainty-mismatch"


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16", "full_bf16": True}])
def test_two_processes_train_what_one_does(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    toy = toy_shelf.paths("sd")
    common = {**LEARNED, "max_train_steps": 4, "optimizer_args": "eps=0.01", "save_state": True, **options}
    alone = train_toy(toy, images, tmp_path / "alone", train_batch_size=2, **common)
    words = make_arguments(toy, images, tmp_path / "both", train_batch_size=1, **common)
    run_ranks(ROOT / "launchers" / "train_network.py", *words)
    states = [load_state(folder / "lora-state")[0]["uncertainty"]["weights"] for folder in (alone, tmp_path / "both")]
    torch.testing.assert_close(*states, rtol=1e-2, atol=1e-4)
    half = bool(options)
    pairs = zip(read_metrics(alone), read_metrics(tmp_path / "both"), strict=True)
    assert all(abs(one["loss/current"] - two["loss/current"]) < (1e-2 if half else 1e-4) for one, two in pairs)
