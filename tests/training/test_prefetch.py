"""What the loader's threads prepare is what the step would have made itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from sfumato.loss import training_loss
from sfumato.training.latents import load_latents
from sfumato.training.prefetch import prefetch
from sfumato.training.run import Run
from toy_runs import build_toy_run, make_images

NOISE = {
    "plain": {},
    "all": {
        "noise_offset": 0.1, "adaptive_noise_scale": 0.1, "multires_noise_iterations": 3, "ip_noise_gamma": 0.1,
        "gradient_accumulation_steps": 2, "timestep_stratified": True,
    },
}  # fmt: skip


def open_run(toy_shelf: ToyShelf, tmp_path: Path, **options: Any) -> Run:
    images, toy = make_images(tmp_path / "images", 3), toy_shelf.paths("sd")
    run = build_toy_run(toy, images, tmp_path / "out", train_batch_size=2, network_train_unet_only=True, **options)
    with run.metrics, run.output_lock:
        return run  # nothing is written


@pytest.mark.full
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("cached", [True, False])
def test_the_loss_is_the_same_to_the_bit(toy_shelf: ToyShelf, tmp_path: Path, noise: str, cached: bool) -> None:
    run = open_run(toy_shelf, tmp_path, cache_latents=cached, **NOISE[noise])
    compared = 0
    for step, plain in zip(prefetch(run, 0), run.loader.steps(), strict=False):
        for batch, bare in zip(step.batches, plain.batches, strict=True):
            assert (batch.draws is not None) == cached
            assert bare.draws is None
            with torch.no_grad():
                losses = [training_loss(run.context, each, load_latents(run, bare), 2) for each in (batch, bare)]
            assert torch.equal(*losses)
            compared += 1
        if compared >= 3:
            break


def test_a_part_of_a_batch_takes_its_draws_along(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    run = open_run(toy_shelf, tmp_path, cache_latents=True, ip_noise_gamma=0.1)
    batch = next(batch for batch in next(prefetch(run, 0)).batches)
    part = batch.take(torch.tensor([1]))
    assert batch.draws is not None
    assert part.draws is not None
    assert torch.equal(part.draws.t, batch.draws.t[1:])
    assert torch.equal(part.draws.noise, batch.draws.noise[1:])
    assert part.draws.input_noise is not None


def test_only_what_is_large_is_moved(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """What the host decides with stays on the host."""
    run = open_run(toy_shelf, tmp_path, cache_latents=True, cache_text_encoder_outputs=True, ip_noise_gamma=0.1)
    batch = next(prefetch(run, 0)).batches[0]
    moved = batch.map_large(lambda tensor: tensor.to("meta"))
    places = {name: value.device.type for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert {name for name, place in places.items() if place == "meta"} == {"latents"}
    assert moved.draws is not None
    assert moved.draws.input_noise is not None
    found = [moved.draws.noise, moved.draws.input_noise, *moved.text["clip"].values()]
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert moved.draws.t.device.type == "cpu"
    assert replace(moved, latents=None).map_large(torch.clone).latents is None
