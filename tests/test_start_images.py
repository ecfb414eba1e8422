"""Images from images: against diffusers' pipelines of every family that has them, with masks and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from denoising import run_denoising
from families.loading import NoMethod, load_model
from families.toys import ToyShelf
from sfumato.config.prompts import Prompt
from sfumato.data.batch import Sizes, Tensors
from sfumato.errors import UserError
from sfumato.families._flux_parts import pack, unpack
from sfumato.families.base import Family
from sfumato.sample import encode_prompts, generate_steps
from sfumato.sampling.denoise import Guidance
from sfumato.sampling.images import encode_start
from sfumato.sampling.request import make_request
from sfumato.sampling.schedulers import make_scheduler
from sfumato.sampling.start import Start

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SIZE = {"height": 64, "width": 64}


class Case:
    """A model, its folder, latents to start from and the noise that a generator of this seed draws."""

    def __init__(self, family: str, shelf: ToyShelf) -> None:
        self.folder = shelf.paths(family, "diffusers")["pretrained_model_name_or_path"]
        self.model: Family = load_model(shelf.options(family, "diffusers"))
        self.channels = self.model.latents.channels
        self.image = torch.randn(1, self.channels, 8, 8, generator=torch.Generator().manual_seed(3))
        self.noise = torch.randn(1, self.channels, 8, 8, generator=torch.Generator().manual_seed(1))
        sizes = Sizes.from_size(1, 64, 64)
        guidance = self.model.sampling.guidance
        self.text, self.negative = (encode_prompts(self.model, [text], sizes, guidance) for text in ("a cat", "a dog"))

    def run(self, strength: float, mask: Tensor | None = None, sampler: str = "ddim") -> Tensor:
        start = Start(latents=self.image, strength=strength, mask=mask)
        generator = torch.Generator().manual_seed(1)
        torch.randn(1, generator=generator)
        guidance = Guidance(negative=self.negative, scale=3.0) if self.model.sampling.scale != 1 else None
        return run_denoising(self.model, self.noise, self.text, guidance, sampler=sampler, steps=5, start=start)


def load_pipeline(name: str, case: Case, sampler: str = "ddim") -> Any:
    import diffusers
    from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image

    if name.startswith("StableDiffusionI"):
        text_only: Any = AutoPipelineForText2Image.from_pretrained(case.folder, safety_checker=None)
        text_only.unet.register_to_config(sample_size=64)  # which the other pipelines compare with
        pipe = getattr(diffusers, name)(**text_only.components, requires_safety_checker=False)
    else:
        pipe = getattr(diffusers, name).from_pretrained(case.folder)
    if case.model.objective.predicts != "velocity":
        pipe.scheduler = make_scheduler(sampler, case.model.objective)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_equal(ours: Tensor, theirs: Tensor, plain: Tensor) -> None:
    assert (ours - plain).abs().max() > 1e-2, "the start changed nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def give(case: Case, strength: float) -> dict[str, Any]:
    return {"num_inference_steps": 5, "strength": strength, "output_type": "latent"} | {
        "generator": torch.Generator().manual_seed(1)
    }


@pytest.mark.parametrize(
    ("sampler", "strength"),
    [
        ("euler", 0.55),
        *(pytest.param(*each, marks=pytest.mark.full) for each in (("ddim", 0.6), ("heun", 1.0), ("dpmsolver++", 0.4))),
    ],
)
def test_an_image_of_stable_diffusion(sampler: str, strength: float, toy_shelf: ToyShelf) -> None:
    case = Case("sd", toy_shelf)
    pipe = load_pipeline("StableDiffusionImg2ImgPipeline", case, sampler)
    hidden, no_hidden = case.text["encoder_hidden_states"], case.negative["encoder_hidden_states"]
    theirs = pipe(
        image=case.image, prompt_embeds=hidden, negative_prompt_embeds=no_hidden, guidance_scale=3.0,
        **give(case, strength),
    ).images  # fmt: skip
    check_equal(case.run(strength, sampler=sampler), theirs, case.image)


@pytest.mark.parametrize("strength", [1.0, pytest.param(0.6, marks=pytest.mark.full)])
def test_a_masked_image_of_stable_diffusion(strength: float, toy_shelf: ToyShelf) -> None:
    """Outside the mask the image's own latents are what is left."""
    case = Case("sd", toy_shelf)
    pipe = load_pipeline("StableDiffusionInpaintPipeline", case)
    hidden, no_hidden = case.text["encoder_hidden_states"], case.negative["encoder_hidden_states"]
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, :32] = 1
    theirs = pipe(
        image=case.image, mask_image=mask, masked_image_latents=case.image, prompt_embeds=hidden,
        negative_prompt_embeds=no_hidden, guidance_scale=3.0, **SIZE, **give(case, strength),
    ).images  # fmt: skip
    small = torch.nn.functional.interpolate(mask, size=(8, 8))
    ours = case.run(strength, small)
    check_equal(ours, theirs, case.image)
    assert torch.equal(ours[(small == 0).expand_as(ours)], case.image[(small == 0).expand_as(ours)])


@pytest.mark.full
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_of_stable_diffusion_xl(masked: bool, toy_shelf: ToyShelf) -> None:
    case = Case("sdxl", toy_shelf)
    kind = "Inpaint" if masked else "Img2Img"
    pipe = load_pipeline(f"StableDiffusionXL{kind}Pipeline", case)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, :32] = 1
    more: dict[str, Any] = {"mask_image": mask, "masked_image_latents": case.image, **SIZE} if masked else {}
    theirs = pipe(
        image=case.image, guidance_scale=3.0, prompt_embeds=case.text["encoder_hidden_states"],
        pooled_prompt_embeds=case.text["text_embeds"], negative_prompt_embeds=case.negative["encoder_hidden_states"],
        negative_pooled_prompt_embeds=case.negative["text_embeds"], **give(case, 0.6), **more,
    ).images  # fmt: skip
    small = torch.nn.functional.interpolate(mask, size=(8, 8)) if masked else None
    check_equal(case.run(0.6, small), theirs, case.image)


@pytest.mark.full
def test_the_vector_of_an_image(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """What CLIP of transformers sees in the image to start from, times the strength, is the prompt's pooled vector."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    case = Case("sdxl", toy_shelf)
    text: Any = case.text
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=text["text_embeds"].shape[-1])
    vision: Any = CLIPVisionModelWithProjection(config).eval()
    vision.save_pretrained(tmp_path / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "clip")
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    prompt = Prompt(
        prompt="a cat", negative_prompt="a dog", width=64, height=64, sample_steps=5, scale=3.0, strength=0.6,
        init_image=str(tmp_path / "start.png"), clip_vision_strength=0.7, clip_vision_model=str(tmp_path / "clip"),
    )  # fmt: skip
    request = make_request(prompt, case.model, sampler="ddim", seed=1)
    method: Any = NoMethod()
    *_, ours = generate_steps(case.model, method, [request])
    start = encode_start(case.model, request, 1)
    assert start is not None
    with torch.no_grad():
        vector = vision(processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"]).image_embeds
    theirs = load_pipeline("StableDiffusionXLImg2ImgPipeline", case)(
        image=start.latents, guidance_scale=3.0, prompt_embeds=text["encoder_hidden_states"],
        pooled_prompt_embeds=0.7 * vector, negative_prompt_embeds=case.negative["encoder_hidden_states"],
        negative_pooled_prompt_embeds=case.negative["text_embeds"], **give(case, 0.6),
    ).images  # fmt: skip
    check_equal(ours.latents, theirs, start.latents)
    without = make_request(replace(prompt, clip_vision_strength=None), case.model, sampler="ddim", seed=1)
    *_, plain = generate_steps(case.model, method, [without])
    assert (plain.latents - theirs).abs().max() > 1e-3
    CLIPVisionModelWithProjection(CLIPVisionConfig(**{**config.to_dict(), "projection_dim": 7})).save_pretrained(
        tmp_path / "other"
    )
    processor.save_pretrained(tmp_path / "other")
    other = replace(prompt, clip_vision_model=str(tmp_path / "other"))
    with pytest.raises(UserError) as raised:
        list(generate_steps(case.model, method, [make_request(other, case.model, sampler="ddim", seed=1)]))
    assert raised.value.code == "clip-vision-width-mismatch"


def embeds_of_flux(text: Tensors) -> dict[str, Tensor]:
    return {"prompt_embeds": text["encoder_hidden_states"], "pooled_prompt_embeds": text["pooled_projections"]}


@pytest.mark.full
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_of_flux(masked: bool, toy_shelf: ToyShelf) -> None:
    case = Case("flux", toy_shelf)
    pipe = load_pipeline(f"Flux{'Inpaint' if masked else 'Img2Img'}Pipeline", case)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, :32] = 1
    more: dict[str, Any] = {"mask_image": mask, "masked_image_latents": case.image} if masked else {}
    theirs = pipe(
        image=case.image, guidance_scale=3.5, **embeds_of_flux(case.text), **SIZE, **give(case, 0.55), **more,
        max_sequence_length=512,
    ).images  # fmt: skip
    small = torch.nn.functional.interpolate(mask, size=(8, 8)) if masked else None
    check_equal(case.run(0.55, small), unpack(theirs, case.image.shape), case.image)
    assert pack(case.image).shape == theirs.shape


@pytest.mark.full
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_of_chroma(masked: bool, toy_shelf: ToyShelf) -> None:
    """Without a negative prompt and the texts cut to what counts, as in the test of whole images of every family."""
    case = Case("chroma", toy_shelf)
    pipe = load_pipeline(f"Chroma{'Inpaint' if masked else 'Img2Img'}Pipeline", case)
    pipe.image_processor.register_to_config(vae_latent_channels=case.channels)  # by which it knows latents
    pipe.transformer.register_to_config(guidance_embeds=False)  # which the inpainting pipeline asks for in vain
    text = case.model.encode_text("t5", ["a cat"])[0]
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, :32] = 1
    more: dict[str, Any] = {"mask_image": mask, "masked_image_latents": case.image} if masked else {}
    theirs = pipe(
        image=case.image, guidance_scale=1.0, prompt_embeds=text["hidden"][None],
        prompt_attention_mask=text["mask"][None], **SIZE, **give(case, 0.55), **more,
    ).images  # fmt: skip
    small = torch.nn.functional.interpolate(mask, size=(8, 8)) if masked else None
    check_equal(case.run(0.55, small), unpack(theirs, case.image.shape), case.image)


@pytest.mark.full
def test_an_image_of_stable_diffusion_3(toy_shelf: ToyShelf) -> None:
    case = Case("sd3", toy_shelf)
    pipe = load_pipeline("StableDiffusion3Img2ImgPipeline", case)
    theirs = pipe(
        image=case.image, prompt_embeds=case.text["encoder_hidden_states"], guidance_scale=3.0,
        pooled_prompt_embeds=case.text["pooled_projections"],
        negative_prompt_embeds=case.negative["encoder_hidden_states"],
        negative_pooled_prompt_embeds=case.negative["pooled_projections"], **SIZE, **give(case, 0.6),
    ).images  # fmt: skip
    check_equal(case.run(0.6), theirs, case.image)


@pytest.mark.full
def test_a_masked_image_of_stable_diffusion_3(toy_shelf: ToyShelf) -> None:
    case = Case("sd3", toy_shelf)
    pipe = load_pipeline("StableDiffusion3InpaintPipeline", case)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, :32] = 1
    theirs = pipe(
        image=case.image, mask_image=mask, masked_image_latents=case.image, guidance_scale=3.0,
        prompt_embeds=case.text["encoder_hidden_states"], pooled_prompt_embeds=case.text["pooled_projections"],
        negative_prompt_embeds=case.negative["encoder_hidden_states"],
        negative_pooled_prompt_embeds=case.negative["pooled_projections"], **SIZE, **give(case, 0.6),
    ).images  # fmt: skip
    small = torch.nn.functional.interpolate(mask, size=(8, 8))
    check_equal(case.run(0.6, small), theirs, case.image)
