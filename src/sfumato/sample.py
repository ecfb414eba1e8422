"""Prompt -> image: one denoising loop over Family.predict with diffusers' schedulers."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from sfumato.config.prompts import Prompt
from sfumato.data.batch import Extras, Sizes, Tensors
from sfumato.diffusion.objective import Objective
from sfumato.encode import live_text
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.methods.base import Method
from sfumato.registry import did_you_mean

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # the field's names -> diffusers' scheduler and its options
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {"steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
    "dpm_2": ("KDPM2DiscreteScheduler", {"steps_offset": 1}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {"steps_offset": 1}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A prompt with every open value filled in: the full recipe of one image."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    seed: int
    steps: int
    scale: float
    guidance: float | None
    sampler: str

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs; at scale 1 the negative prompt has no say."""
        return self.scale != 1.0


def fill_in(prompt: Prompt, model: Family, *, sampler: str, seed: int) -> Picture:
    """The family's defaults where the prompt is silent; sizes rounded down to what the family can make."""
    usual = model.sampling
    multiple = usual.size_multiple
    width, height = prompt.width or usual.width, prompt.height or usual.height
    return Picture(
        prompt=prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        width=max(64, width // multiple * multiple),
        height=max(64, height // multiple * multiple),
        seed=seed if prompt.seed is None else prompt.seed,
        steps=prompt.sample_steps or usual.steps,
        scale=usual.scale if prompt.scale is None else prompt.scale,
        guidance=usual.guidance if prompt.guidance_scale is None else prompt.guidance_scale,
        sampler=prompt.sample_sampler or sampler,
    )


def make_scheduler(name: str, objective: Objective) -> Any:
    """A fresh diffusers scheduler for the objective; the field's names, with or without the k_ prefix.

    A flow is always walked by Euler steps over the family's own time grid.
    """
    from diffusers import schedulers

    if objective.predicts == "velocity":
        return getattr(schedulers, FLOW_SCHEDULER)(**objective.scheduler_options())
    if name.removeprefix("k_") not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}", fix=did_you_mean(name, SAMPLERS))
    kind, options = SAMPLERS[name.removeprefix("k_")]
    if kind == "LMSDiscreteScheduler" and importlib.util.find_spec("scipy") is None:
        raise UserError(f"the sampler {name} needs scipy", fix="pip install scipy")
    return getattr(schedulers, kind)(**objective.scheduler_options(), **options)


@torch.no_grad()
def denoise(
    model: Family,
    method: Method,
    scheduler: Any,
    x: Tensor,
    positive: Tensors,
    negative: Tensors | None,
    *,
    steps: int,
    scale: float,
    extras: Extras,
    generator: Generator,
) -> Tensor:
    """Standard normal x (B, C, h, w) -> clean latents. `negative` None: no classifier-free guidance."""
    model.objective.set_timesteps(scheduler, steps, model.latents, x.shape)
    x = model.objective.first_noise(scheduler, x)
    for t in scheduler.timesteps:
        scaled = model.objective.scheduler_input(scheduler, x, t)
        now = t.float().expand(x.shape[0])
        prediction = method.predict(model, scaled, now, positive, extras).float()
        if negative is not None:
            without = method.predict(model, scaled, now, negative, extras).float()
            prediction = without + scale * (prediction - without)
        x = scheduler.step(prediction, t, x, **_chance(scheduler, generator)).prev_sample
    return x


def _chance(scheduler: Any, generator: Generator) -> dict[str, Generator]:
    """Only some schedulers draw noise on the way."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if takes else {}


@torch.no_grad()
def conditioning(model: Family, captions: list[str], sizes: Sizes, guidance: float | None) -> Tensors:
    features = {part: live_text(model, part, captions) for part in model.text_parts}
    return model.condition(features, sizes, guidance)


@torch.no_grad()
def generate(model: Family, method: Method, picture: Picture) -> Tensor:
    """One image (3, H, W) in [-1, 1], float32 on the CPU; a function of the picture and the weights alone."""
    generator = Generator().manual_seed(picture.seed)
    spec = model.latents
    shape = (1, spec.channels, picture.height // spec.downscale, picture.width // spec.downscale)
    extras, sizes = Extras(), Sizes.plain(1, picture.height, picture.width)
    method.begin(model, extras)
    positive = conditioning(model, [method.caption(picture.prompt)], sizes, picture.guidance)
    negative = None
    if picture.guided:
        negative = conditioning(model, [method.caption(picture.negative_prompt)], sizes, picture.guidance)
    x = torch.randn(shape, generator=generator).to(model.device)
    scheduler = make_scheduler(picture.sampler, model.objective)
    clean = denoise(
        model, method, scheduler, x, positive, negative,
        steps=picture.steps, scale=picture.scale, extras=extras, generator=generator,
    )  # fmt: skip
    return model.decode(clean)[0].float().cpu().clamp(-1, 1)
