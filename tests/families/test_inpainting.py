"""Models for inpainting: training with masks, and images as diffusers' pipelines paint them."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from families.loading import NoMethod, load_model
from families.toys import ToyShelf
from rehearsing import needs_rehearsal
from sfumato.cli.main import main
from sfumato.config import ModelOptions, load_config
from sfumato.config.prompts import Prompt
from sfumato.data.batch import INPAINT
from sfumato.data.inpaint_masks import draw_mask
from sfumato.errors import UserError
from sfumato.families.encoding import encode_images
from sfumato.plan import make_run_plan
from sfumato.sample import generate
from sfumato.sampling.request import make_request
from sfumato.tools.rehearse import rehearse_plan
from sfumato.training.latents import load_other_images
from toy_runs import build_toy_run, make_arguments, make_images, train_toy

Toy = Mapping[str, Path]
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


def make_toy(toy: Toy, folder: Path) -> dict[str, Path]:
    """The same with nine input channels, and its tokenizers beside it."""
    source = toy["pretrained_model_name_or_path"]
    shutil.copytree(source.parent, folder)
    tensors = load_file(source)
    shape = (tensors[FIRST_LAYER].shape[0], 9, 3, 3)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 9
    save_file({**tensors, FIRST_LAYER: weight}, folder / "inpainting.safetensors")
    return {**toy, "pretrained_model_name_or_path": folder / "inpainting.safetensors"}


@pytest.fixture(scope="module")
def toys(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    root = tmp_path_factory.mktemp("inpainting")
    return {family: make_toy(toy_shelf.paths(family), root / family) for family in ("sd", "sdxl")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


def test_masks_are_of_all_kinds_and_sizes() -> None:
    masks = [draw_mask(Random(seed), (96, 64)) for seed in range(200)]
    assert {mask.shape for mask in masks} == {(64, 96)}
    assert all(set(np.unique(mask)) <= {0.0, 1.0} for mask in masks)
    shares = np.array([mask.mean() for mask in masks])
    assert 0.15 < np.median(shares) < 0.5
    assert shares.std() > 0.1
    assert np.array_equal(masks[3], draw_mask(Random(3), (96, 64)))


def test_what_the_denoiser_sees(toys: dict[str, Toy], images: Path, tmp_path: Path) -> None:
    """A mask of the sample's own and the latents of the image with gray where it is; the same for any batch."""
    run = build_toy_run(toys["sd"], images, tmp_path, train_inpainting=True)
    (batch,) = next(run.loader.steps()).batches
    seen = load_other_images(run, batch).extras.images[INPAINT].latents
    assert seen is not None
    again = load_other_images(run, batch).extras.images[INPAINT].latents
    assert again is not None
    assert torch.equal(seen, again)
    assert batch.pixels is not None
    assert seen.shape == (1, 5, batch.pixels.shape[2] // 8, batch.pixels.shape[3] // 8)
    assert set(seen[:, 0].unique().tolist()) == {0.0, 1.0}
    whole = encode_images(run.model, batch.pixels, batch.entry_seeds.tolist(), vae_batch_size=1)
    assert not torch.equal(seen[:, 1:], whole)


def make_masks(images: Path, folder: Path, kept: float) -> dict[str, Any]:
    """The options of masks whose left part is painted; kept: the share of each that is black."""
    folder.mkdir()
    for path in (images / "2_cat").glob("*.png"):
        mask = np.zeros(Image.open(path).size[::-1], np.uint8)
        mask[:, : int(mask.shape[1] * (1 - kept))] = 255
        Image.fromarray(mask).save(folder / path.name)
    return {"masked_loss": True, "conditioning_data_dir": folder, "train_inpainting": True}


def test_masks_of_the_dataset_are_painted(toys: dict[str, Toy], images: Path, tmp_path: Path) -> None:
    run = build_toy_run(toys["sd"], images, tmp_path / "out", **make_masks(images, tmp_path / "masks", 0.5))
    (batch,) = next(run.loader.steps()).batches
    seen = load_other_images(run, batch).extras.images[INPAINT].latents
    assert seen is not None
    assert batch.mask is not None
    assert torch.equal(seen[:, :1], batch.mask)
    assert seen[:, 0].mean() == 0.5


@pytest.mark.fast_for("[sd]")
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_what_is_left_of_masked_images_is_cached(
    family: str, toys: dict[str, Toy], images: Path, tmp_path: Path
) -> None:
    """The denoiser sees the same bits as without a cache, and no step needs the autoencoder."""
    own = make_masks(images, tmp_path / "masks", 0.5) | {"flip_aug": True, "cache_dir": tmp_path / "cache"}
    seen: list[torch.Tensor] = []
    for cached in (False, True):
        run = build_toy_run(toys[family], images, tmp_path / f"out{cached}", cache_latents=cached, **own)
        (batch,) = next(run.loader.steps()).batches
        latents = load_other_images(run, batch).extras.images[INPAINT].latents
        assert latents is not None
        seen.append(latents)
        assert run.model.parts["vae"].is_loaded is not cached
    assert torch.equal(*seen)


def test_diffusers_paints_the_same(toys: dict[str, Toy], toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Its pipeline with the same noise, the image's latents without noise of their own, and all steps."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = Image.fromarray(np.pad(np.full((32, 64), 255, np.uint8), ((16, 16), (0, 0))))
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    model = load_model(ModelOptions(pretrained_model_name_or_path=str(toys["sd"]["pretrained_model_name_or_path"])))
    assert model.blueprint.inpaints
    prompt = Prompt(
        prompt="a cat", negative_prompt="a dog", width=64, height=64, seed=3, sample_steps=3, scale=4.0,
        init_image=str(tmp_path / "image.png"), mask_image=str(tmp_path / "mask.png"), strength=1.0,
    )  # fmt: skip
    ours = generate(model, NoMethod(), make_request(prompt, model, sampler="ddim", seed=3))

    folder = toy_shelf.paths("sd", "diffusers")["pretrained_model_name_or_path"]
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9, "sample_size": 64})
    assert isinstance(unet, UNet2DConditionModel)
    unet.load_state_dict(model.parts["denoiser"].module.state_dict())
    parts = {name: part for name, part in pipe.components.items() if name not in ("unet", "image_encoder")}
    inpaint = StableDiffusionInpaintPipeline(**parts, unet=unet, requires_safety_checker=False)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        theirs = inpaint(
            prompt="a cat", negative_prompt="a dog", image=image, mask_image=mask, height=64, width=64, strength=1.0,
            num_inference_steps=3, guidance_scale=4.0, latents=noise, output_type="pt",
        ).images[0]  # type: ignore[union-attr]  # fmt: skip
    assert isinstance(theirs, torch.Tensor)
    torch.testing.assert_close((ours + 1) / 2, theirs.cpu(), atol=1e-3, rtol=0)


def test_generate_repeats_a_preview(
    toys: dict[str, Toy], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(images / "2_cat" / "0.png", "image.png")
    Image.fromarray(np.pad(np.full((32, 64), 255, np.uint8), ((16, 16), (0, 0)))).save("mask.png")
    line = "a cat --w 64 --h 64 --s 2 --d 5 --l 3"
    Path("prompts.txt").write_text(f"{line} --img image.png --mk mask.png\n{line}\n")
    output = train_toy(toys["sd"], images, Path("out"), train_inpainting=True, max_train_steps=1,
                       sample_prompts="prompts.txt", sample_every_n_steps=1, learning_rate="1e-1")  # fmt: skip
    painted, free = (Image.open(path) for path in sorted((output / "sample").iterdir()))
    assert painted.tobytes() != free.tobytes()
    argv = shlex.split(painted.info["command"])[1:]
    argv[argv.index("--pretrained_model_name_or_path") + 1] = str(toys["sd"]["pretrained_model_name_or_path"])
    assert main(argv) == 0
    (made,) = Path("outputs").iterdir()
    assert Image.open(made).tobytes() == painted.tobytes()


@pytest.mark.parametrize(("is_inpainting", "options", "codes"), [
    (True, {"cache_latents": True, "masked_loss": None, "conditioning_data_dir": None},
     "inpainting-with-cached-latents"),
    (True, {"cache_latents": True}, "inpainting-mask-white"),
    (False, {"train_inpainting": True}, "inpainting-model-missing"),
])  # fmt: skip
def test_what_is_refused(
    is_inpainting: bool, options: dict[str, Any], codes: str, toys: dict[str, Toy], toy_shelf: ToyShelf, images: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    toy = toys["sd"] if is_inpainting else toy_shelf.paths("sd")
    masks = make_masks(images, tmp_path / "masks", 0.0) if is_inpainting else {}
    with pytest.raises(UserError) as error:
        build_toy_run(toy, images, tmp_path / "out", **{**masks, **options})
    assert error.value.code == codes


def test_a_checkpoint_says_what_it_is(toys: dict[str, Toy], images: Path, tmp_path: Path) -> None:
    plan = make_run_plan(load_config(make_arguments(toys["sdxl"], images, tmp_path)), processes=1)
    assert plan.blueprint.title == "Stable Diffusion XL, for inpainting"
    assert any("sees a mask" in note for note in plan.notes)


@needs_rehearsal
@pytest.mark.full
def test_it_rehearses(toys: dict[str, Toy], images: Path, tmp_path: Path) -> None:
    """The autoencoder stays, since every step encodes what is not painted."""
    argv = make_arguments(toys["sd"], images, tmp_path / "out", train_inpainting=True, network_train_unet_only=True)
    stages = {stage.name: stage for stage in rehearse_plan(make_run_plan(load_config(argv), processes=1))}
    assert stages["training step"].resident["vae"] > 0
