"""Every family's samples against those of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from denoising import run_denoising
from every_family import each_case, find_toys
from families.toys import ToyShelf
from sfumato.config.prompts import Prompt
from sfumato.data.batch import Sizes
from sfumato.families._flux_parts import pack, unpack
from sfumato.sample import encode_prompts
from sfumato.sampling.denoise import Guidance
from sfumato.sampling.request import make_request
from sfumato.sampling.schedulers import make_scheduler


def sd_pipeline(folder: Path, model: Any, request: Any, x: Tensor) -> Tensor:
    """Serves Stable Diffusion XL, too, whose sizes are by default those of the image."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = make_scheduler(request.sampler, model.objective)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=request.prompt, negative_prompt=request.negative_prompt, height=request.height, width=request.width,
        num_inference_steps=request.steps, guidance_scale=request.scale, latents=x, output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip


def flux_pipeline(folder: Path, model: Any, request: Any, x: Tensor) -> Tensor:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def embeds(text: str) -> tuple[Tensor, Tensor]:
        pooled, hidden = (model.encode_text(part, [text])[0] for part in ("clip_l", "t5"))
        return pooled["pooled"][None], hidden["hidden"][None]

    (pooled, hidden), (no_pooled, no_hidden) = embeds(request.prompt), embeds(request.negative_prompt)
    found = pipe(
        prompt_embeds=hidden, pooled_prompt_embeds=pooled, negative_prompt_embeds=no_hidden,
        negative_pooled_prompt_embeds=no_pooled, true_cfg_scale=request.scale, guidance_scale=request.guidance,
        height=request.height, width=request.width, num_inference_steps=request.steps, latents=pack(x),
        output_type="latent", max_sequence_length=512,
    ).images  # fmt: skip
    return unpack(found, x.shape)


def lumina_pipeline(folder: Path, model: Any, request: Any, x: Tensor) -> Tensor:
    from diffusers import Lumina2Pipeline

    pipe = Lumina2Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    hidden, mask = pipe._get_gemma_prompt_embeds(request.prompt)  # the pipeline always adds a system prompt
    no_hidden, no_mask = pipe._get_gemma_prompt_embeds(request.negative_prompt)
    return pipe(
        prompt_embeds=hidden, prompt_attention_mask=mask, negative_prompt_embeds=no_hidden,
        negative_prompt_attention_mask=no_mask, guidance_scale=request.scale, height=request.height,
        width=request.width, num_inference_steps=request.steps, latents=x, output_type="latent",
        cfg_normalization=False,
    ).images  # fmt: skip


def sd3_pipeline(folder: Path, model: Any, request: Any, x: Tensor) -> Tensor:
    from diffusers import StableDiffusion3Pipeline

    pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=request.prompt, negative_prompt=request.negative_prompt, height=request.height, width=request.width,
        num_inference_steps=request.steps, guidance_scale=request.scale, latents=x, output_type="latent",
    ).images  # fmt: skip


def chroma_pipeline(folder: Path, model: Any, request: Any, x: Tensor) -> Tensor:
    """The texts cut to what counts: the pipeline adds its mask to the scores, which hides next to nothing."""
    from diffusers import ChromaPipeline

    pipe = ChromaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    texts = [model.encode_text("t5", [text])[0] for text in (request.prompt, request.negative_prompt)]
    hidden, no_hidden = (text["hidden"][None] for text in texts)
    mask, no_mask = (text["mask"][None] for text in texts)
    found = pipe(
        prompt_embeds=hidden, prompt_attention_mask=mask, negative_prompt_embeds=no_hidden,
        negative_prompt_attention_mask=no_mask, guidance_scale=request.scale, height=request.height,
        width=request.width, num_inference_steps=request.steps, latents=pack(x), output_type="latent",
    ).images  # fmt: skip
    return unpack(found, x.shape)


PIPELINES: dict[str, Callable[..., Tensor]] = {
    "sd": sd_pipeline,
    "sdxl": sd_pipeline,
    "flux": flux_pipeline,
    "chroma": chroma_pipeline,
    "sd3": sd3_pipeline,
    "lumina": lumina_pipeline,
}


@each_case
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_denoising_equals_the_diffusers_pipeline(case: str, toy_shelf: ToyShelf, scale: float) -> None:
    toys = find_toys(toy_shelf, case)
    model = toys.load(toys.unmasked)
    request = make_request(
        Prompt(prompt="a cat", negative_prompt="a red dog", width=64, height=96, sample_steps=4, scale=scale),
        model, sampler="ddim", seed=3,
    )  # fmt: skip
    spec = model.latents
    x = torch.randn(1, spec.channels, 12, 8, generator=torch.Generator().manual_seed(request.seed))
    sizes = Sizes.from_size(1, 96, 64)
    negative = encode_prompts(model, [request.negative_prompt], sizes, request.guidance) if request.guided else None
    text = encode_prompts(model, [request.prompt], sizes, request.guidance)
    ours = run_denoising(model, x, text, Guidance(negative=negative, scale=scale), seed=5, steps=request.steps)
    theirs = PIPELINES[model.name](toys.folder, model, request, x)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
