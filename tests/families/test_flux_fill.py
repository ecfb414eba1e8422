"""FLUX.1 Fill: recognized, trained, and images as diffusers' pipeline paints them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from families.loading import NoMethod, load_model, read_model
from families.toys import ToyShelf, write_fill_toy
from rehearsing import needs_rehearsal
from sfumato.config import ModelOptions, load_config
from sfumato.config.prompts import Prompt
from sfumato.errors import UserError
from sfumato.plan import make_run_plan
from sfumato.sample import generate
from sfumato.sampling.request import make_request
from sfumato.tools.rehearse import rehearse_plan
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

TRAINING = {"timestep_sampling": "flux_shift", "model_prediction_type": "raw", "train_inpainting": True}
ADAPTER = {"network_module": "networks.lora_flux"}


@pytest.fixture(scope="module")
def toy(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_fill_toy(toy_shelf, tmp_path_factory.mktemp("fill") / "model")


@pytest.fixture(scope="module")
def options(toy: Mapping[str, Path]) -> ModelOptions:
    named = {name: str(path) for name, path in toy.items() if not name.startswith("tokenizer")}
    return ModelOptions(**named)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


def test_it_is_recognized(options: ModelOptions) -> None:
    blueprint = read_model(options)
    assert blueprint.inpaints
    assert (blueprint.title, blueprint.architecture) == ("FLUX.1 Fill", "flux-1-fill-dev")
    assert blueprint.metadata["ss_guidance_scale"] == 30.0
    with pytest.raises(UserError) as error:
        read_model(options, family="flux_kontext")
    assert error.value.code == "model-family-mismatch"


@pytest.mark.full
def test_diffusers_paints_the_same(options: ModelOptions, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Its pipeline with the same noise and the image's latents without noise of their own; its own default guidance."""
    from diffusers import FluxFillPipeline, FluxPipeline, FluxTransformer2DModel
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8))
    mask = Image.fromarray(np.pad(np.full((39, 64), 255, np.uint8), ((16, 41), (0, 0))))  # no multiple of 8
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    model = load_model(options)
    prompt = Prompt(
        prompt="a cat", width=64, height=96, seed=3, sample_steps=3, init_image=str(tmp_path / "image.png"),
        mask_image=str(tmp_path / "mask.png"),
    )  # fmt: skip
    request = make_request(prompt, model, sampler="ddim", seed=3)
    assert request.guidance == 30.0
    ours = generate(model, NoMethod(), request)

    plain = FluxPipeline.from_pretrained(toy_shelf.paths("flux", "diffusers")["pretrained_model_name_or_path"])
    transformer = FluxTransformer2DModel.from_config(
        {**plain.transformer.config, "in_channels": 384, "out_channels": 64}
    )
    assert isinstance(transformer, FluxTransformer2DModel)
    transformer.load_state_dict(model.denoiser.state_dict())
    parts = {
        name: part for name, part in plain.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    pipe: Any = FluxFillPipeline(**{**parts, "transformer": transformer})
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 16, 12, 8), generator=torch.Generator().manual_seed(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        patch.setattr("diffusers.pipelines.flux.pipeline_flux_fill.randn_tensor", lambda *args, **more: noise)
        theirs = pipe(
            prompt="a cat", image=image, mask_image=mask, height=96, width=64, num_inference_steps=3, output_type="pt"
        ).images[0]
    torch.testing.assert_close((ours.clamp(-1, 1) + 1) / 2, theirs.cpu(), atol=1e-4, rtol=0)


@pytest.mark.full
def test_what_is_left_of_masked_images_is_cached(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """The denoiser learns the same as without a cache, and no step needs the autoencoder."""
    masks = tmp_path / "masks" / "2_cat"
    masks.mkdir(parents=True)
    for number, path in enumerate(sorted((images / "2_cat").glob("*.png"))):
        width, height = Image.open(path).size
        mask = np.zeros((height, width), np.uint8)
        mask[8 * number : 8 * number + 24, 16:40] = 255
        Image.fromarray(mask).save(masks / path.name)
    options = {**TRAINING, **ADAPTER, "masked_loss": True, "conditioning_data_dir": masks.parent}
    options |= {"max_train_steps": 3, "train_batch_size": 2, "flip_aug": True, "learning_rate": "1e-2"}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    memory = train_toy(toy, images, tmp_path / "memory", **options, cache_latents=True)
    disk = {"cache_latents_to_disk": True, "cache_dir": tmp_path / "cache"}
    runs = [train_toy(toy, images, tmp_path / f"disk{n}", **options, **disk) for n in range(2)]
    for cached in (memory, *runs):
        assert read_metrics(cached) == read_metrics(plain)
        assert equal_tensors(read_weights(cached), read_weights(plain))
    drawn = train_toy(
        toy, images, tmp_path / "drawn", **{**options, "masked_loss": None, "conditioning_data_dir": None}
    )
    assert not equal_tensors(read_weights(drawn), read_weights(plain))
    run = build_toy_run(toy, images, tmp_path / "run", **options, cache_latents=True)
    assert not run.model.parts["vae"].is_loaded


@pytest.mark.full
def test_previews_paint_within_the_mask(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.pad(np.full((32, 64), 255, np.uint8), ((16, 16), (0, 0)))).save(mask)
    line = "a cat --w 64 --h 64 --s 2 --d 5"
    (tmp_path / "prompts.txt").write_text(f"{line} --img {images / '2_cat' / '0.png'} --mk {mask}\n{line}\n")
    output = train_toy(toy, images, tmp_path / "out", max_train_steps=1, sample_every_n_steps=1,
                       sample_prompts=tmp_path / "prompts.txt", **TRAINING, **ADAPTER)  # fmt: skip
    painted, free = (Image.open(path) for path in sorted((output / "sample").iterdir()))
    assert painted.tobytes() != free.tobytes()
    assert "--mk" in painted.info["command"] or "--mask" in painted.info["command"]


@needs_rehearsal
@pytest.mark.full
def test_it_rehearses(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    argv = make_arguments(toy, images, tmp_path / "out", **TRAINING, **ADAPTER, network_train_unet_only=True)
    stages = {stage.name: stage for stage in rehearse_plan(make_run_plan(load_config(argv), processes=1))}
    assert stages["training step"].resident["vae"] > 0
