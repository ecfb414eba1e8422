"""Optimizers, schedules and float16 as a user runs them, at toy size: what is logged, saved, previewed and resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from sfumato.config import load_config
from sfumato.errors import SeveralErrors, UserError
from sfumato.formats.state import load_state
from sfumato.plan import make_run_plan
from sfumato.train import train_step
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

Toy = Mapping[str, Path]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def sd(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


RUNS = {
    "float16": {"mixed_precision": "fp16"},
    "schedule-free": {"optimizer_type": "AdamWScheduleFree", "optimizer_args": "warmup_steps=2"},
    "Prodigy": {"optimizer_type": "prodigy", "learning_rate": 1, "lr_scheduler": "cosine"},
    "AdaFactor": {"optimizer_type": "adafactor", "learning_rate": None},
    "class": {"lr_scheduler_type": "ExponentialLR", "lr_scheduler_args": "gamma=0.5"},
    "schedule-free in bfloat16": {
        "optimizer_type": "AdamWScheduleFree",
        "full_bf16": True,
        "mixed_precision": "bf16",
    },
    "8 bits in float16": {"mixed_precision": "fp16", "optimizer_type": "AdamW8bit", "lr_scheduler": "linear"},
}
PACKAGES = {
    "schedule-free": "schedulefree",
    "schedule-free in bfloat16": "schedulefree",
    "Prodigy": "prodigyopt",
    "8 bits in float16": "bitsandbytes",
}


@pytest.mark.parametrize(
    "case", ["float16", "schedule-free", *(pytest.param(case, marks=pytest.mark.full) for case in list(RUNS)[2:])]
)
@pytest.mark.full
def test_resume_is_exact_and_previews_change_nothing(sd: Toy, images: Path, tmp_path: Path, case: str) -> None:
    """4 steps in one go = 4 steps with previews after each = 2 steps, resume, 2 steps."""
    if case in PACKAGES:
        pytest.importorskip(PACKAGES[case])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    options: dict[str, Any] = {"max_train_steps": 4, "network_train_unet_only": True, **RUNS[case]}
    straight = train_toy(sd, images, tmp_path / "straight", **options)
    parts = tmp_path / "parts"
    previews = {"sample_prompts": prompts, "sample_every_n_steps": 1, "save_state": True, "save_every_n_steps": 2}
    train_toy(sd, images, parts, **options, **previews)
    assert equal_tensors(read_weights(straight), read_weights(parts))
    resumed = tmp_path / "resumed"
    train_toy(sd, images, resumed, **options, resume=parts / "lora-step00000002-state")
    assert equal_tensors(read_weights(straight), read_weights(resumed))
    assert read_metrics(straight) == read_metrics(parts)
    assert read_metrics(straight)[2:] == read_metrics(resumed)
    assert not equal_tensors(read_weights(straight), read_weights(parts, "lora-step00000002"))


def test_series_of_learning_rates(sd: Toy, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    output = train_toy(
        sd, images, tmp_path, optimizer_type="Prodigy", learning_rate=1, max_train_steps=3, lr_scheduler="linear"
    )
    rows = read_metrics(output)
    assert [row["lr/denoiser"] for row in rows] == pytest.approx([1, 2 / 3, 1 / 3])
    assert all(row["lr/d*lr/clip"] == row["lr/d*lr/denoiser"] > 0 for row in rows)


def test_the_file_holds_the_average_and_the_state_what_trains(sd: Toy, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    options = {"optimizer_type": "SGDScheduleFree", "learning_rate": "0.1", "network_train_unet_only": True}
    output = train_toy(sd, images, tmp_path, **options, save_state=True)
    state, _ = load_state(output / "lora-state")
    optimizer = state["optimizer"]["state"]
    [group] = optimizer["param_groups"]
    assert group["train_mode"]
    file, momentum, up = read_weights(output), group["momentum"], 0
    for number, (name, trained) in enumerate(state["weights"].items()):
        fast = optimizer["state"][number]["z"]
        average = file[name.removeprefix("adapters.") + ".weight"]
        assert torch.allclose(momentum * average + (1 - momentum) * fast, trained, atol=1e-6)
        up += bool(trained.any()) and not torch.equal(average, trained)
    assert up > len(state["weights"]) / 2


def open_at(toy: Toy, images: Path, output: Path, **options: Any) -> Any:
    return build_toy_run(toy, images, output, **options)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["AdamW", "SGDNesterov"])
def test_an_overflow_costs_one_step_and_half_the_scale(sd: Toy, images: Path, tmp_path: Path, kind: str) -> None:
    """The weights and the optimizer's state stay; the next steps go on with gradients of the right size."""
    options = {"mixed_precision": "fp16", "optimizer_type": kind, "network_train_unet_only": True}
    opened = open_at(sd, images, tmp_path, **options)
    steps = opened.loader.steps(0)
    train_step(opened, next(steps))
    assert all(parameter.dtype == torch.float32 for parameter in opened.parameters)
    before = [parameter.detach().clone() for parameter in opened.parameters]
    scale = opened.scaler.get_scale()
    handle = opened.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    train_step(opened, next(steps))
    handle.remove()
    assert all(torch.equal(old, new) for old, new in zip(before, opened.parameters, strict=True))
    assert opened.scaler.get_scale() == scale / 2
    for _ in range(3):  # one of which may overflow by itself
        train_step(opened, next(steps))
    moved = [not torch.equal(old, new) for old, new in zip(before, opened.parameters, strict=True)]
    assert any(moved)
    assert all(parameter.isfinite().all() for parameter in opened.parameters)


@pytest.mark.full
def test_gradients_are_clipped_at_their_own_size(sd: Toy, images: Path, tmp_path: Path) -> None:
    """Not at the size that the loss scale gives them: clipping acts on the same norm with and without float16."""
    norms = {}
    for precision in ("no", "fp16"):
        options = {"mixed_precision": precision, "max_grad_norm": "1e-3", "network_train_unet_only": True}
        opened = open_at(sd, images, tmp_path / precision, **options)
        train_step(opened, next(opened.loader.steps(0)))
        gradients = [parameter.grad for parameter in opened.parameters if parameter.grad is not None]
        norms[precision] = float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])))
    assert norms["fp16"] == pytest.approx(norms["no"], rel=2e-2)
    assert norms["no"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.full
def test_float16_is_near_float32(sd: Toy, images: Path, tmp_path: Path) -> None:
    options = {"max_train_steps": 3, "no_half_vae": True}
    plain = read_metrics(train_toy(sd, images, tmp_path / "plain", **options))
    half = read_metrics(train_toy(sd, images, tmp_path / "half", **options, mixed_precision="fp16"))
    assert [row["loss/current"] for row in half] == pytest.approx([row["loss/current"] for row in plain], rel=2e-3)


@pytest.mark.full
def test_resume_in_another_precision(sd: Toy, images: Path, tmp_path: Path) -> None:
    train_toy(sd, images, tmp_path, max_train_steps=2, save_state=True)
    train_toy(sd, images, tmp_path, max_train_steps=3, mixed_precision="fp16", resume=tmp_path, save_state=True)
    train_toy(sd, images, tmp_path, max_train_steps=4, resume=tmp_path)
    assert len(read_metrics(tmp_path)) == 4


def test_resume_with_another_optimizer_is_refused(sd: Toy, images: Path, tmp_path: Path) -> None:
    train_toy(sd, images, tmp_path, max_train_steps=2, save_state=True)
    with pytest.raises(UserError) as error:
        train_toy(sd, images, tmp_path, max_train_steps=3, resume=tmp_path, optimizer_type="SGDNesterov")
    assert error.value.code == "resume-optimizer-mismatch"


@pytest.mark.full
def test_mistakes_are_reported_before_weights_are_read(sd: Toy, images: Path, tmp_path: Path) -> None:
    config = load_config(
        make_arguments(
            sd, images, tmp_path, optimizer_args="weight_deccay=1", lr_scheduler="polynomial",
            lr_scheduler_args="lr_end=x",
        )
    )  # fmt: skip
    with pytest.raises(SeveralErrors) as raised:
        make_run_plan(config, processes=1)
    argument, schedule = raised.value.errors
    assert "'weight_deccay'" in str(argument)
    assert "'weight_decay'" in str(argument)
    assert schedule.code == "schedule-arguments-refused"
