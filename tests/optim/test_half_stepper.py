"""Weights in bfloat16: stochastic rounding against closed forms, steps of any optimizer, and exact resume."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from families.toys import ToyShelf
from sfumato.config import OptimOptions, load_config
from sfumato.formats.state import load_state
from sfumato.optim import half_stepper
from sfumato.optim.averaging import eval_weights
from sfumato.optim.groups import ParameterGroup
from sfumato.optim.half_stepper import HalfStepper, keep_in_half, stochastic_round
from sfumato.optim.optimizers import class_name, make_optimizer, restore_optimizer
from sfumato.parallel.start import start_parallel
from sfumato.train import train_step
from sfumato.training.setup_run import build_run
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbors(value: float) -> tuple[float, float]:
    """The nearest bfloat16 numbers around a finite one, by torch's own rounding and its table of bits."""
    nearest = torch.tensor(value).to(torch.bfloat16)
    bits = nearest.view(torch.int16)
    around = torch.stack([(bits + step).view(torch.bfloat16) for step in (-1, 0, 1)]).double()
    below, above = around[around <= value], around[around >= value]
    return float(below.max()), float(above.min())


@given(st.floats(2.0**-100, 2.0**100, width=32), st.booleans())
def test_each_neighbor_is_as_likely_as_the_other_is_far(magnitude: float, negative: bool) -> None:
    value, count = -magnitude if negative else magnitude, 4000
    result = stochastic_round(torch.full((count,), value), generator())
    low, high = neighbors(value)
    assert set(result.double().tolist()) <= {low, high}
    if low < high:
        share = (value - low) / (high - low)
        deviation = (share * (1 - share) / count) ** 0.5
        assert float((result.double() == high).double().mean()) == pytest.approx(share, abs=5 * deviation + 2 / count)


def test_the_mean_is_the_value() -> None:
    """Over many draws of many values the mean error vanishes as 1 / sqrt(count)."""
    values = torch.randn(200, generator=generator(1))
    draws = torch.stack([stochastic_round(values, generator(seed)).double() for seed in range(2000)])
    spread = draws.std(0) / 2000**0.5
    assert (((draws.mean(0) - values.double()) / spread.clamp(min=1e-12)).abs() < 5).all()
    assert float((draws.mean(0) - values).mean()) == pytest.approx(0, abs=4 * float(spread.mean()) / 200**0.5)


def test_exact_and_nonfinite_values_stay() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    result = stochastic_round(every.float(), generator())
    nan = every.isnan()
    assert torch.equal(result[~nan].view(torch.int16), every[~nan].view(torch.int16))
    worst = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # a carry would make them 0
    assert result[nan].isnan().all()
    assert stochastic_round(worst, generator()).isnan().all()


# ---------------------------------------------------------------- steps


def network(sizes: tuple[int, ...] = (8, 16, 3)) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def make_groups(module: nn.Sequential, lr: float) -> list[ParameterGroup]:
    return [
        ParameterGroup(name=str(i), parameters=list(layer.parameters()), learning_rate=lr)
        for i, layer in enumerate(module)
    ]


def set_gradients(module: nn.Module, step: int) -> None:
    draw = generator(100 + step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter)


def test_a_small_constant_step_counts_in_expectation() -> None:
    """200 steps of 2^-12 of a weight of 1: lost by round-to-nearest, 200 * 2^-12 in all by stochastic."""
    size, lr, steps = 20_000, 2.0**-12, 200
    moved = {}
    for stochastic in (False, True):
        parameter = nn.Parameter(torch.ones(size))
        keep_in_half([ParameterGroup(name="", parameters=[parameter], learning_rate=lr)], torch.bfloat16)
        optimizer = torch.optim.SGD([parameter], lr=lr)
        step = HalfStepper(optimizer, seed=1, stochastic=stochastic)
        for index in range(steps):
            parameter.grad = -torch.ones_like(parameter)
            step.step(index)
        assert parameter.dtype == torch.bfloat16
        moved[stochastic] = parameter.detach().double() - 1
    assert not moved[False].any()
    spread = float(moved[True].std()) / size**0.5
    assert float(moved[True].mean()) == pytest.approx(steps * lr, abs=5 * spread)
    assert spread < 0.01 * steps * lr


OPTIMIZERS = {
    "AdamW": {}, "SGDNesterov": {}, "AdaFactor": {"optimizer_args": {"relative_step": False}}, "Adagrad": {},
    "NAdam": {}, "RMSprop": {}, "Lion": {}, "Prodigy": {"learning_rate": 1.0}, "DAdaptAdam": {"learning_rate": 1.0},
}  # fmt: skip
PACKAGES = {"Lion": "lion_pytorch", "Prodigy": "prodigyopt", "DAdaptAdam": "dadaptation"}


@pytest.fixture(params=OPTIMIZERS)
def options(request: pytest.FixtureRequest) -> OptimOptions:
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param])
    return OptimOptions(optimizer_type=request.param, **{"learning_rate": 0.01, **OPTIMIZERS[request.param]})


def make_bf16_optimizer(module: nn.Sequential, options: OptimOptions) -> Any:
    keep_in_half(make_groups(module, 0.0), torch.bfloat16)
    return make_optimizer(options, make_groups(module, options.learning_rate))


def test_a_step_is_the_one_of_float32_rounded(options: OptimOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the optimizer: three steps, some weights at a time, next to the same on float32 weights that are
    rounded after each; the state is float32's own.
    """
    monkeypatch.setattr(half_stepper, "CHUNK_SIZE", 20)
    ours, theirs = network(), network()
    optimizer = make_bf16_optimizer(ours, options)
    step = HalfStepper(optimizer, seed=1, stochastic=False)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(mine)
    plain = make_optimizer(options, make_groups(theirs, options.learning_rate))
    for index in range(3):
        set_gradients(ours, index)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert mine.grad is not None
            other.grad = mine.grad.float()
        before = [parameter.grad for parameter in ours.parameters()]
        step.step(index)
        plain.step()
        assert all(parameter.grad is kept for parameter, kept in zip(ours.parameters(), before, strict=True))
        with torch.no_grad():
            for other in theirs.parameters():
                other.copy_(other.to(torch.bfloat16))
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine.float(), other)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_equal(optimizer.state[mine], plain.state[other])


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name


def test_only_some_weights_are_in_float32_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW never sees more than was allowed; an optimizer that measures all together sees all."""
    monkeypatch.setattr(half_stepper, "CHUNK_SIZE", 50)
    module = network()
    options = OptimOptions(optimizer_type="AdamW", learning_rate=0.01)
    optimizer = make_bf16_optimizer(module, options)
    step = HalfStepper(optimizer, seed=1, stochastic=True)
    seen: list[list[int]] = []
    taken: Callable[[], Any] = optimizer.step

    def watched() -> None:
        seen.append([p.numel() for group in optimizer.param_groups for p in group["params"]])
        taken()

    monkeypatch.setattr(optimizer, "step", watched)
    set_gradients(module, 0)
    step.step(0)
    assert seen == [[128], [16], [48], [3]]
    step.per_parameter = False
    step.step(1)
    assert seen[4:] == [[128, 16, 48, 3]]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize("part", [1, 130, 10_000])
def test_rounding_does_not_depend_on_the_chunk_size(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, or two parameters of one step, round differently."""
    options, result = OptimOptions(optimizer_type="AdamW", learning_rate=1e-5), []
    for size in (50, part):
        monkeypatch.setattr(half_stepper, "CHUNK_SIZE", size)
        module = network()
        step = HalfStepper(make_bf16_optimizer(module, options), seed=1, stochastic=True)
        for index in range(3):
            set_gradients(module, index)
            step.step(index)
        result.append(module.state_dict())
    assert equal_tensors(*result)
    values = torch.full((64,), 1.001)
    draws = [step._round(values, index, number) for index in (0, 1) for number in (0, 1)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


def test_a_failed_step_leaves_the_groups_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    optimizer = make_bf16_optimizer(module, OptimOptions(optimizer_type="AdamW", learning_rate=0.01))
    step = HalfStepper(optimizer, seed=1, stochastic=True)
    set_gradients(module, 0)
    step.step(0)

    def fails() -> None:
        raise OSError

    monkeypatch.setattr(optimizer, "step", fails)
    with pytest.raises(OSError):
        step.step(1)
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(module.parameters())
    assert set(optimizer.state) == set(module.parameters())


def test_a_parameter_without_gradient_is_skipped() -> None:
    module = network()
    optimizer = make_bf16_optimizer(module, OptimOptions(optimizer_type="AdamW", learning_rate=0.01))
    before = [parameter.detach().clone() for parameter in module.parameters()]
    set_gradients(module, 0)
    module[0].weight.grad = None
    HalfStepper(optimizer, seed=1, stochastic=True).step(0)
    moved = [not torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True)]
    assert moved == [False, True, True, True]


def test_resume_continues_exactly(options: OptimOptions) -> None:
    straight, parts = network(), network()
    first = make_bf16_optimizer(straight, options)
    for index in range(4):
        set_gradients(straight, index)
        HalfStepper(first, seed=1, stochastic=True).step(index)
    second = make_bf16_optimizer(parts, options)
    for index in range(4):
        if index == 2:
            state = second.state_dict()
            second = make_bf16_optimizer(parts, options)
            restore_optimizer(second, state, class_name(second))
        set_gradients(parts, index)
        HalfStepper(second, seed=1, stochastic=True).step(index)
    assert equal_tensors(straight.state_dict(), parts.state_dict())


# ---------------------------------------------------------------- training


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


BF16 = {"full_bf16": True, "mixed_precision": "bf16"}
LORA = {"network_train_unet_only": True, **BF16}
FULL = {"method": "full", "network_dim": None, "learning_rate": "1e-5", **BF16}


@pytest.mark.parametrize("method", [LORA, pytest.param(FULL, marks=pytest.mark.full)])
def test_resume_is_exact(toy_shelf: ToyShelf, images: Path, tmp_path: Path, method: dict) -> None:
    toy, options = toy_shelf.paths("sd"), {"max_train_steps": 4, "ema_sigma_rel": [0.1], **method}
    straight = train_toy(toy, images, tmp_path / "straight", **options, save_every_n_steps=2, save_state=True)
    state, _ = load_state(straight / "lora-step00000002-state")
    assert {tensor.dtype for tensor in state["weights"].values()} == {torch.bfloat16}
    for moments in state["optimizer"]["state"]["state"].values():
        assert {tensor.dtype for tensor in moments.values()} == {torch.float32}
    again = train_toy(toy, images, tmp_path / "again", **options, resume=straight / "lora-step00000002-state")
    for name in ("lora", "lora-ema0.1"):
        assert equal_tensors(read_weights(straight, name), read_weights(again, name))
    assert read_metrics(straight)[2:] == read_metrics(again)


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.full)])
def test_weights_gradients_and_file_are_in_bfloat16(
    toy_shelf: ToyShelf, family: str, images: Path, tmp_path: Path
) -> None:
    """Of a whole denoiser; a step moves some weights, which round-to-nearest would not."""
    words = make_arguments(toy_shelf.paths(family), images, tmp_path, **{**FULL, "learning_rate": "1e-6"})
    opened_run = build_run(load_config(words), start_parallel())
    assert opened_run is not None
    before = [parameter.detach().clone() for parameter in opened_run.parameters]
    steps = opened_run.loader.steps(0)
    train_step(opened_run, next(steps))
    assert {parameter.dtype for parameter in opened_run.parameters} == {torch.bfloat16}
    assert {p.grad.dtype for p in opened_run.parameters if p.grad is not None} == {torch.bfloat16}
    moved = sum(int((old != new).sum()) for old, new in zip(before, opened_run.parameters, strict=True))
    assert 0 < moved < 0.2 * sum(parameter.numel() for parameter in before)
    from sfumato.training.saving import save_output

    save_output(opened_run, tmp_path / "lora.safetensors", 1)
    trained = {str(name) for name, tensor in read_weights(tmp_path).items() if tensor.dtype == torch.bfloat16}
    assert len(trained) >= len(before) / 3  # stacked ones count once


def test_the_plan_notes_the_rounding(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    config = load_config(make_arguments(toy_shelf.paths("sd"), images, tmp_path, **LORA))
    assert any("stochastic rounding" in note for note in config.notes)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_the_average_of_a_schedule_free_optimizer(name: str) -> None:
    """In float32, then rounded; the weights that train come back bit for bit."""
    pytest.importorskip("schedulefree")
    parameter = nn.Parameter(torch.randn(50, generator=generator()))
    group = ParameterGroup(name="x", parameters=[parameter], learning_rate=0.1)
    keep_in_half([group], torch.bfloat16)
    optimizer = make_optimizer(OptimOptions(optimizer_type=name), [group])
    stepper = HalfStepper(optimizer, seed=0, stochastic=True)
    for step in range(8):  # the first steps of RAdam do not average
        parameter.grad = torch.ones_like(parameter) * (step + 1)
        stepper.step(step)
    trained, fast = parameter.detach().clone(), optimizer.state[parameter]["z"]
    assert (trained.dtype, fast.dtype) == (torch.bfloat16, torch.float32)
    first = optimizer.param_groups[0]
    beta = first["momentum"] if "momentum" in first else first["betas"][0]
    with eval_weights(optimizer):
        average = trained.float().lerp(fast, 1 - 1 / beta)
        assert torch.equal(parameter, average.to(torch.bfloat16))
        assert not torch.equal(parameter, trained)
    assert torch.equal(parameter, trained)
    assert first["train_mode"]


def test_every_float16_is_unchanged() -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = values[values.isfinite()]
    for seed in range(5):
        rounded = stochastic_round(values.float(), torch.Generator().manual_seed(seed), torch.float16)
        assert torch.equal(rounded, values)
