"""Runs that begin at a step of their own: the straight run's samples, names and rates are what they are held to."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families.toys import ToyShelf
from sfumato.config import load_config
from sfumato.data.loader import Step
from sfumato.errors import UserError
from sfumato.plan import make_run_plan
from sfumato.training.start_point import StartPoint
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

Toy = Mapping[str, Path]
LIGHT: dict[str, Any] = {
    "network_train_unet_only": True,
    "cache_latents": True,
    "cache_text_encoder_outputs": True,
    "optimizer_type": "SGD",
    "learning_rate": 0.5,
    "max_train_steps": 14,
    "text_cache_variants": 3,
    "shuffle_caption": True,
}  # 5 pictures twice: 10 steps are an epoch


@pytest.fixture
def toy(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def steps(toy: Toy, images: Path, output: Path, **options: Any) -> list[Step]:
    training = build_toy_run(toy, images, output, **{**LIGHT, **options})
    return list(islice(training.loader.steps(training.start.step), 12))


def ids(step: Step) -> list[int]:
    return [number for batch in step.batches for number in batch.ids.tolist()]


def captions(step: Step) -> list[str]:
    return [caption for batch in step.batches for caption in batch.captions]


def pixels(step: Step) -> list[Tensor | None]:
    return [batch.latents for batch in step.batches]


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"initial_epoch": 2}, 10),
        ({"initial_epoch": 3, "initial_step": 2, "gradient_accumulation_steps": 2, "train_batch_size": 2}, 2),
    ],
)
def test_the_samples_are_those_of_the_straight_run(
    toy: Toy, images: Path, tmp_path: Path, options: dict[str, Any], first: int
) -> None:
    """Those from that step on; without --skip_until_initial_step those from the beginning, under other names."""
    plain = {name: value for name, value in options.items() if "initial" not in name}
    straight = steps(toy, images, tmp_path / "out", **plain)
    skipped = steps(toy, images, tmp_path / "out", **options, skip_until_initial_step=True)
    renamed = steps(toy, images, tmp_path / "out", **options)
    assert [step.index for step in straight] == list(range(12))
    assert [step.index for step in skipped] == [step.index for step in renamed] == list(range(first, first + 12))
    assert [step.epoch for step in skipped] == [step.epoch for step in renamed]
    for one, other in zip(skipped, straight[first:], strict=False):
        assert one.epoch == other.epoch
        assert captions(one) == captions(other)
    for others, begin in ((skipped, first), (renamed, 0)):
        for one, other in zip(others, straight[begin:], strict=False):
            assert ids(one) == ids(other)
            for a, b in zip(pixels(one), pixels(other), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert ids(skipped[0]) != ids(straight[0])


@pytest.mark.full
def test_from_saved_weights_the_straight_run_goes_on(toy: Toy, images: Path, tmp_path: Path) -> None:
    """With an optimizer and a schedule that remember nothing, the file of step 5 is all that is needed."""
    straight = train_toy(toy, images, tmp_path / "straight", **LIGHT, save_every_n_steps=5)
    options = {**LIGHT, "network_weights": straight / "lora-step00000005.safetensors", "save_every_n_steps": 5}
    later = train_toy(toy, images, tmp_path / "later", **options, initial_step=5, skip_until_initial_step=True)
    assert equal_tensors(read_weights(later), read_weights(straight))
    assert equal_tensors(read_weights(later, "lora-step00000010"), read_weights(straight, "lora-step00000010"))
    assert not (later / "lora-step00000005.safetensors").exists()
    for name in ("step", "loss/current"):
        assert [row[name] for row in read_metrics(later)] == [row[name] for row in read_metrics(straight)][5:]
    again = train_toy(toy, images, tmp_path / "again", **options, initial_step=5)
    assert not equal_tensors(read_weights(again), read_weights(straight))


RATES = {**LIGHT, "lr_scheduler": "linear", "lr_warmup_steps": 2, "save_state": True}


def rates(output: Path) -> list[tuple[int, float]]:
    return [(int(row["step"]), row["lr/denoiser"]) for row in read_metrics(output)]


@pytest.mark.full
def test_rates_begin_anew_or_go_on_with_the_state(toy: Toy, images: Path, tmp_path: Path) -> None:
    eight = rates(train_toy(toy, images, tmp_path / "eight", **{**RATES, "max_train_steps": 8}))
    fresh = rates(train_toy(toy, images, tmp_path / "fresh", **RATES, initial_step=6))
    assert fresh == [(step + 6, rate) for step, rate in eight]

    straight = train_toy(toy, images, tmp_path / "straight", **RATES, save_every_n_steps=5)
    options = {**RATES, "max_train_steps": 20, "resume": straight / "lora-step00000005-state"}
    moved = train_toy(toy, images, tmp_path / "moved", **options, initial_step=11)
    assert rates(moved) == [(step + 6, rate) for step, rate in rates(straight)[5:]]
    assert equal_tensors(read_weights(moved), read_weights(straight))  # the data goes on where it was, too
    skipped = train_toy(toy, images, tmp_path / "skipped", **options, initial_step=11, skip_until_initial_step=True)
    assert not equal_tensors(read_weights(skipped), read_weights(straight))


@pytest.mark.full
def test_a_run_that_began_elsewhere_resumes_exactly(toy: Toy, images: Path, tmp_path: Path) -> None:
    options = {**RATES, "save_every_n_steps": 8}
    straight = train_toy(toy, images, tmp_path / "straight", **options, initial_step=3)
    parts = train_toy(toy, images, tmp_path / "parts", **options, resume=straight / "lora-step00000008-state")
    assert equal_tensors(read_weights(parts), read_weights(straight))
    assert rates(parts) == rates(straight)[5:]


def test_a_state_keeps_its_start_point() -> None:
    start = StartPoint(step=7, data=2, schedule=1)
    assert StartPoint(**start.counters(9)) == StartPoint(step=9, data=2, schedule=1)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"initial_step": 14}, ["--initial_step 14", "step 14", "step 14"]),
        ({"initial_epoch": 3}, ["--initial_epoch 3", "step 20", "step 14"]),
        ({"initial_epoch": 3, "max_train_epochs": 2}, ["--initial_epoch 3", "step 20", "step 20"]),
    ],
)
def test_a_step_must_be_left(
    toy: Toy, images: Path, tmp_path: Path, options: dict[str, Any], values: list[str]
) -> None:
    config = load_config(make_arguments(toy, images, tmp_path / "out", **{**LIGHT, **options}))
    with pytest.raises(UserError) as caught:
        make_run_plan(config, processes=1)
    assert caught.value.code == "initial-step-after-end"
    assert all(value in str(caught.value) for value in values)
