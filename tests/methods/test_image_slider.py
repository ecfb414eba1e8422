"""Sliders from pairs of images: the loss against merged models, and a run's life on every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from families.toys import ToyShelf
from others.models import compute_output, compute_with_file, load_toy
from sfumato.errors import UserError
from sfumato.families.encoding import encode_with_grad
from sfumato.formats.hashed_file import write_hashed_file
from sfumato.loss import draw_noise, training_loss
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.train import train_step
from sfumato.training.latents import load_latents, load_other_images
from sfumato.training.run import Run
from toy_runs import SEVERAL_TOKENS, build_toy_run, equal_tensors, make_images, read_metrics, read_weights, train_toy

FAMILIES = ("sd", "sdxl", "sd3", "flux", "flux_kontext", "chroma", "lumina")
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """More and less of brightness, in images of equal names; captions are beside the first."""
    root = tmp_path_factory.mktemp("pairs")
    more, less = make_images(root / "more", 2), root / "less"
    less.mkdir()
    for path in (more / "2_cat").glob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)) * 0.3).astype(np.uint8)).save(less / path.name)
    return more, less


def make_options(folders: tuple[Path, Path], family: str) -> dict[str, Any]:
    options = {"method": "image_slider", "reference_data_dirs": folders[1], "network_train_unet_only": True}
    return options | ({"model_type": "flux_kontext"} if family == "flux_kontext" else {})


def build(toy_shelf: ToyShelf, folders: tuple[Path, Path], output: Path, family: str, **options: Any) -> Run:
    return build_toy_run(
        toy_shelf.paths(family), folders[0], output, **make_options(folders, family), **options
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_loss_is_that_of_models_with_the_adapter_merged_both_ways(
    family: str, folders: tuple[Path, Path], toy_shelf: ToyShelf, tmp_path: Path
) -> None:
    run = build(toy_shelf, folders, tmp_path / "run", family, train_batch_size=2, enable_bucket=False)
    engine = run.method.engine  # pyright: ignore[reportAttributeAccessIssue]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in engine.named_parameters():
        if "lora_up" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    write_hashed_file(tmp_path / "a.safetensors", engine.export_tensors(), {}, None)
    batch = load_other_images(run, next(run.loader.steps()).batches[0])
    more, less = load_latents(run, batch), batch.extras.images["reference_1"].latents
    assert less is not None
    assert not torch.allclose(more, less, atol=0.05)
    draws = draw_noise(run.context, batch, more)
    with torch.no_grad():
        found = training_loss(run.context, batch, more, len(more))
        losses: list[float] = []
        for x0, strength in ((more, 1.0), (less, -1.0)):
            model = load_toy(toy_shelf, family)
            InferenceAdapters(model, (), base=[(tmp_path / "a.safetensors", strength)])
            level = model.objective.level(draws.t)
            noisy = model.objective.add_noise(x0, draws.noise, level)
            features = {part: encode_with_grad(model, part, batch.captions) for part in model.text_parts}
            conditioning = model.condition(features, batch.sizes, run.context.recipe.guidance)
            prediction = model.predict(noisy, draws.t, conditioning, {})
            squares = (prediction - (draws.noise if family == "sd" else draws.noise - x0)).square()
            scale = 1 if family == "sd" else (draws.t / 1000).reshape(-1, 1, 1, 1) ** 2  # FLUX compares images
            losses.append(float((squares * scale).mean()))
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert float(found) == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.full
@each_family
def test_it_learns_resumes_bitwise_and_its_file_loads(
    family: str, folders: tuple[Path, Path], toy_shelf: ToyShelf, tmp_path: Path
) -> None:
    run = build(toy_shelf, folders, tmp_path / "run", family, learning_rate="1e-2", **SEVERAL_TOKENS)
    step = next(run.loader.steps())
    losses = [float(train_step(run, step).loss) for _ in range(6)]
    assert losses[-1] < losses[0] * 0.999, losses
    assert not run.method.report()
    options = make_options(folders, family) | {"max_train_steps": 4, "save_state": True, "learning_rate": "1e-2"}
    options |= {"network_dropout": 0.1, "cache_latents": True, "cache_text_encoder_outputs": True}
    toy = toy_shelf.paths(family)
    straight = train_toy(toy, folders[0], tmp_path / "straight", **options)
    parts = train_toy(toy, folders[0], tmp_path / "parts", **options, save_every_n_steps=2)
    train_toy(toy, folders[0], parts, **options, resume=parts / "lora-step00000002-state")
    assert equal_tensors(read_weights(straight), read_weights(parts))
    assert read_metrics(straight) == read_metrics(parts)
    model = load_toy(toy_shelf, family)
    plain = compute_output(model)
    assert (compute_with_file(model, straight / "lora.safetensors") - plain).abs().max() > 1e-5


@pytest.mark.parametrize("partners", [0, 2])
def test_each_image_has_one_partner(
    partners: int, folders: tuple[Path, Path], toy_shelf: ToyShelf, tmp_path: Path
) -> None:
    options = make_options(folders, "flux") | {"reference_data_dirs": [folders[1]] * partners or None}
    with pytest.raises(UserError) as error:
        build_toy_run(toy_shelf.paths("flux"), folders[0], tmp_path, **options)
    assert error.value.code == "slider-pairs-missing"
