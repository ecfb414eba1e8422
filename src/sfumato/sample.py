"""Prompt -> image: one denoising loop over Family.predict with diffusers' schedulers."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from sfumato.common.registry import did_you_mean
from sfumato.config.prompts import Prompt
from sfumato.data.batch import Extras, ImageInput, Images, Sizes, Tensors, name_reference
from sfumato.data.cache.entries import to_tensor
from sfumato.data.images import read_image
from sfumato.diffusion.objective import Objective
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders, decode_latents, encode_images, encode_with_grad

_T = TypeVar("_T")
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # sd-scripts' names -> diffusers' scheduler and its options
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


class Predictor(Protocol):
    """What generating an image needs of a training method, or of the adapters in its place."""

    live_text: frozenset[str]  # encoders that train, whose output is never remembered

    def rewrite_caption(self, text: str) -> str: ...

    def set_batch(self, model: Family, extras: Extras) -> None: ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """A prompt with every default filled in: all that one image depends on besides the model."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    seed: int
    steps: int
    scale: float
    guidance: float | None
    sampler: str
    cfg_trunc_ratio: float = 1.0
    renorm_cfg: float = 0.0
    flow_shift: float | None = None  # of the time grid; None: the family's own
    reference_image: str = ""  # the file of a reference image
    weighted: bool = True  # whether (words) and [words] have more and less weight

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs; at scale 1 the negative prompt has no effect."""
        return self.scale != 1.0

    @property
    def batch_key(self) -> ImageRequest:
        """Everything but prompts and seed: requests with the same key can be generated in one batch."""
        return replace(self, prompt="", negative_prompt="", seed=0)


def make_request(prompt: Prompt, model: Family, *, sampler: str, seed: int, weighted: bool = True) -> ImageRequest:
    """The family's defaults where the prompt gives no value; sizes rounded down to what the family can generate."""
    defaults = model.sampling
    multiple = defaults.size_multiple
    width, height = prompt.width or defaults.width, prompt.height or defaults.height
    return ImageRequest(
        prompt=prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        width=max(64, width // multiple * multiple),
        height=max(64, height // multiple * multiple),
        seed=seed if prompt.seed is None else prompt.seed,
        steps=prompt.sample_steps or defaults.steps,
        scale=defaults.scale if prompt.scale is None else prompt.scale,
        guidance=defaults.guidance if prompt.guidance_scale is None else prompt.guidance_scale,
        sampler=prompt.sample_sampler or sampler,
        cfg_trunc_ratio=defaults.cfg_trunc_ratio if prompt.cfg_trunc_ratio is None else prompt.cfg_trunc_ratio,
        renorm_cfg=defaults.renorm_cfg if prompt.renorm_cfg is None else prompt.renorm_cfg,
        flow_shift=prompt.flow_shift if _takes_shift(prompt, model) else None,
        reference_image=(prompt.reference_image or "") if model.num_references else "",
        weighted=weighted,
    )


def list_ignored(prompt: Prompt, request: ImageRequest, model: Family) -> Iterator[str]:
    """Options of the prompt that are ignored on this model, and sizes that were changed."""
    start = f"the prompt {prompt.prompt[:40]!r}: "
    if not request.guided:
        given = {"the negative prompt": prompt.negative_prompt, "--ctr": prompt.cfg_trunc_ratio}
        given |= {"--rcfg": prompt.renorm_cfg}
        for name in (name for name, value in given.items() if value):
            yield f"{start}{name} has no effect, because classifier-free guidance is off; --l above 1 turns it on"
    if prompt.guidance_scale and model.sampling.guidance is None:
        yield f"{start}--g has no effect, this model has no embedded guidance; classifier-free guidance is --l"
    if prompt.sample_sampler and "sample_sampler" not in model.options:
        yield f"{start}--ss is ignored: flow models always use Euler"
    if prompt.controlnet_image:
        yield f"{start}--cn has no effect, there is no control network"
    if prompt.reference_image and not model.num_references:
        yield f"{start}--ref has no effect, this model takes no reference images"
    if prompt.flow_shift is not None and not _takes_shift(prompt, model):
        yield f"{start}--fs has no effect on this model, whose steps have no such shift"
    multiple = model.sampling.size_multiple
    for name in ("width", "height"):
        requested, used = vars(prompt)[name], vars(request)[name]
        if requested not in (None, used):
            yield f"{start}the {name} {requested} becomes {used}, a multiple of {multiple}"


def _takes_shift(prompt: Prompt, model: Family) -> bool:
    return prompt.flow_shift is not None and model.objective.with_shift(prompt.flow_shift) is not None


def make_scheduler(name: str, objective: Objective) -> Any:
    """A new diffusers scheduler for the objective; sd-scripts' names, with or without the k_ prefix.

    Flow models always use Euler steps over the family's own time grid.
    """
    from diffusers import schedulers

    if objective.predicts == "velocity":
        return getattr(schedulers, FLOW_SCHEDULER)(**objective.scheduler_options())
    if name.removeprefix("k_") not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}", code="sampler-unknown", fix=did_you_mean(name, SAMPLERS))
    scheduler_name, options = SAMPLERS[name.removeprefix("k_")]
    if scheduler_name == "LMSDiscreteScheduler" and importlib.util.find_spec("scipy") is None:
        raise UserError(f"the sampler {name} needs scipy", code="sampler-needs-scipy", fix="pip install scipy")
    scheduler, options = getattr(schedulers, scheduler_name), objective.scheduler_options() | options
    if unknown := options.keys() - inspect.signature(scheduler).parameters.keys():
        raise UserError(
            f"sampler {name} does not support this model's noise schedule ({', '.join(sorted(unknown))})",
            code="sampler-unsupported",
            fix="--sample_sampler euler, or ddim, euler_a, dpmsolver++",
        )
    return scheduler(**options)


@torch.no_grad()
def denoise(
    model: Family,
    method: Predictor,
    scheduler: Any,
    x: Tensor,
    positive: Tensors,
    negative: Tensors | None,
    *,
    steps: int,
    scale: float,
    extras: Extras,
    generator: Generator | list[Generator],
    cfg_trunc_ratio: float = 1.0,
    renorm_cfg: float = 0.0,
    flow_shift: float | None = None,
) -> Tensor:
    """Standard normal x (B, C, h, w) -> clean latents. `negative` None: no classifier-free guidance.

    cfg_trunc_ratio: guidance ends at this share of the way. renorm_cfg: the largest norm of a guided prediction, as a
    multiple of the norm of the prompt's own; 0 for no limit. flow_shift: of the time grid, where the objective has
    such a shift. generator: one for all samples, or one for each.
    """
    shifted = None if flow_shift is None else model.objective.with_shift(flow_shift)
    (shifted or model.objective).set_timesteps(scheduler, steps, model.latents, x.shape)
    x = model.objective.scale_initial_noise(scheduler, x)
    for t in scheduler.timesteps:
        scaled = model.objective.scale_model_input(scheduler, x, t)
        timesteps = t.float().expand(x.shape[0])
        prediction = method.predict(model, scaled, timesteps, positive, extras).float()
        if negative is not None and (cfg_trunc_ratio >= 1 or 1 - float(t) / 1000 < cfg_trunc_ratio):
            unconditional = method.predict(model, scaled, timesteps, negative, extras).float()
            guided = unconditional + scale * (prediction - unconditional)
            prediction = limit_norm(guided, prediction, renorm_cfg) if renorm_cfg else guided
        x = scheduler.step(prediction, t, x, **_generator_argument(scheduler, generator)).prev_sample
    return x


def limit_norm(guided: Tensor, plain: Tensor, limit: float) -> Tensor:
    """`guided` (B, C, h, w), the norm of each sample at most `limit` times that of `plain`."""
    lengths = [x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (guided, plain)]
    return guided * (limit * lengths[1] / lengths[0]).clamp(max=1)


def _generator_argument(
    scheduler: Any, generator: Generator | list[Generator]
) -> dict[str, Generator | list[Generator]]:
    """Only some schedulers draw noise in their steps."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if takes else {}


@torch.no_grad()
def encode_prompts(
    model: Family,
    captions: list[str],
    sizes: Sizes,
    guidance: float | None,
    *,
    weighted: bool = False,
    negative: bool = False,
    frozen: FrozenTextEncoders | None = None,
    live: frozenset[str] = frozenset(),
) -> Tensors:
    """The denoiser's text arguments; `weighted`: (words) and [words] have more and less weight.

    With `frozen`, the features of all encoders but the `live` ones come from there.
    """
    features: dict[str, Tensors] = {}
    for part in model.text_parts:
        if frozen is None or part in live:
            encoded = encode_with_grad(model, part, captions, weighted=weighted, negative=negative)
        else:
            encoded = frozen.encode(part, captions, weighted=weighted, negative=negative)
        features[part] = {name: tensor.to(model.device, non_blocking=True) for name, tensor in encoded.items()}
    return model.condition(features, sizes, guidance)


def group_requests(requests: Sequence[tuple[ImageRequest, _T]], size: int) -> Iterator[list[tuple[ImageRequest, _T]]]:
    """Batches of at most `size` requests with the same key, in order."""
    groups: dict[ImageRequest, list[tuple[ImageRequest, _T]]] = {}
    for request, extra in requests:
        groups.setdefault(request.batch_key, []).append((request, extra))
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def encode_reference(model: Family, request: ImageRequest, count: int) -> Images:
    """The latents of a request's reference image for so many samples; UserError where it cannot be read."""
    if not request.reference_image:
        return {}
    image = read_image(Path(request.reference_image))
    size = model.choose_reference_size(image.size, (request.width, request.height))
    pixels = to_tensor([np.asarray(image.resize(size, Image.Resampling.LANCZOS))])
    latents = encode_images(model, pixels, None, vae_batch_size=1)
    return {name_reference(0): ImageInput(latents=latents.expand(count, -1, -1, -1))}


def generate(
    model: Family, method: Predictor, request: ImageRequest, frozen: FrozenTextEncoders | None = None
) -> Tensor:
    """One image (3, H, W) in [-1, 1], float32 on the CPU; a function of the request and the weights alone.

    frozen: features of encoders that do not train, perhaps remembered from before they left the device.
    """
    return generate_batch(model, method, [request], frozen)[0]


@torch.no_grad()
def generate_batch(
    model: Family, method: Predictor, requests: Sequence[ImageRequest], frozen: FrozenTextEncoders | None = None
) -> list[Tensor]:
    """The images of requests with one batch key, each as `generate` makes it alone, up to rounding."""
    first, count = requests[0], len(requests)
    assert all(request.batch_key == first.batch_key for request in requests)
    generators = [Generator().manual_seed(request.seed) for request in requests]
    spec = model.latents
    shape = (spec.channels, first.height // spec.downscale, first.width // spec.downscale)
    extras, sizes = (
        Extras(images=encode_reference(model, first, count)),
        Sizes.from_size(count, first.height, first.width),
    )
    method.set_batch(model, extras)

    def read(texts: list[str], *, negative: bool) -> Tensors:
        return encode_prompts(
            model, [method.rewrite_caption(text) for text in texts], sizes, first.guidance,
            weighted=first.weighted, negative=negative, frozen=frozen, live=method.live_text,
        )  # fmt: skip

    positive = read([request.prompt for request in requests], negative=False)
    negative = read([request.negative_prompt for request in requests], negative=True) if first.guided else None
    x = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    x = x.to(model.device, non_blocking=True)
    scheduler = make_scheduler(first.sampler, model.objective)
    clean = denoise(
        model, method, scheduler, x, positive, negative,
        steps=first.steps, scale=first.scale, extras=extras, generator=generators,
        cfg_trunc_ratio=first.cfg_trunc_ratio, renorm_cfg=first.renorm_cfg, flow_shift=first.flow_shift,
    )  # fmt: skip
    return list(decode_latents(model, clean).cpu().clamp(-1, 1))
