"""Prompt -> image: one denoising loop over Family.predict with diffusers' schedulers."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Generator, Tensor

from sfumato.common.registry import did_you_mean
from sfumato.config.prompts import Prompt
from sfumato.data.batch import Extras, Sizes, Tensors
from sfumato.diffusion.objective import Objective
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenText, decode_latents, live_text

T = TypeVar("T")
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


class Draws(Protocol):
    """What making a picture asks of a training method, or of whatever else stands beside the model."""

    live_text: frozenset[str]  # encoders whose output changes, so that it is never remembered

    def caption(self, text: str) -> str: ...

    def begin(self, model: Family, extras: Extras) -> None: ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor: ...


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
    cfg_trunc_ratio: float = 1.0
    renorm_cfg: float = 0.0
    flow_shift: float | None = None  # of the time grid; None: the family's own
    weighted: bool = True  # whether (words) and [words] count more and less

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs; at scale 1 the negative prompt has no say."""
        return self.scale != 1.0

    @property
    def way(self) -> Picture:
        """All of the recipe but words and chance: pictures that agree in it can be made together."""
        return replace(self, prompt="", negative_prompt="", seed=0)


def fill_in(prompt: Prompt, model: Family, *, sampler: str, seed: int, weighted: bool = True) -> Picture:
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
        cfg_trunc_ratio=usual.cfg_trunc_ratio if prompt.cfg_trunc_ratio is None else prompt.cfg_trunc_ratio,
        renorm_cfg=usual.renorm_cfg if prompt.renorm_cfg is None else prompt.renorm_cfg,
        flow_shift=prompt.flow_shift if _takes_shift(prompt, model) else None,
        weighted=weighted,
    )


def without_effect(prompt: Prompt, picture: Picture, model: Family) -> Iterator[str]:
    """What the prompt asks for in vain on this model, and sizes that are not as asked."""
    start = f"the prompt {prompt.prompt[:40]!r}: "
    if not picture.guided:
        given = {"the negative prompt": prompt.negative_prompt, "--ctr": prompt.cfg_trunc_ratio}
        given |= {"--rcfg": prompt.renorm_cfg}
        for name in (name for name, value in given.items() if value):
            yield f"{start}{name} has no effect, since classifier-free guidance is off; --l above 1 turns it on"
    if prompt.guidance_scale and model.sampling.guidance is None:
        yield f"{start}--g has no effect, this model has no embedded guidance; classifier-free guidance is --l"
    if prompt.sample_sampler and "sample_sampler" not in model.options:
        yield f"{start}--ss has no effect, this model is always walked by Euler steps"
    if prompt.controlnet_image:
        yield f"{start}--cn has no effect, there is no control network"
    if prompt.flow_shift is not None and not _takes_shift(prompt, model):
        yield f"{start}--fs has no effect on this model, whose steps have no such shift"
    for name in ("width", "height"):
        asked, made = vars(prompt)[name], vars(picture)[name]
        if asked not in (None, made):
            yield f"{start}the {name} {asked} is made {made}, a multiple of {model.sampling.size_multiple} from 64 on"


def _takes_shift(prompt: Prompt, model: Family) -> bool:
    return prompt.flow_shift is not None and model.objective.at_shift(prompt.flow_shift) is not None


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
    scheduler, options = getattr(schedulers, kind), objective.scheduler_options() | options
    if unknown := options.keys() - inspect.signature(scheduler).parameters.keys():
        raise UserError(
            f"the sampler {name} cannot walk this model's noise schedule ({', '.join(sorted(unknown))})",
            fix="--sample_sampler euler, or ddim, euler_a, dpmsolver++",
        )
    return scheduler(**options)


@torch.no_grad()
def denoise(
    model: Family,
    method: Draws,
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

    cfg_trunc_ratio: the guidance ends where this share of the way is done. renorm_cfg: the longest that a guided
    prediction may be, in lengths of the one for the prompt; 0 for any length. flow_shift: how far steps
    are moved towards noise, where the objective has such a shift. generator: one for all, or one for each.
    """
    moved = None if flow_shift is None else model.objective.at_shift(flow_shift)
    (moved or model.objective).set_timesteps(scheduler, steps, model.latents, x.shape)
    x = model.objective.first_noise(scheduler, x)
    for t in scheduler.timesteps:
        scaled = model.objective.scheduler_input(scheduler, x, t)
        now = t.float().expand(x.shape[0])
        prediction = method.predict(model, scaled, now, positive, extras).float()
        if negative is not None and (cfg_trunc_ratio >= 1 or 1 - float(t) / 1000 < cfg_trunc_ratio):
            without = method.predict(model, scaled, now, negative, extras).float()
            guided = without + scale * (prediction - without)
            prediction = shortened(guided, prediction, renorm_cfg) if renorm_cfg else guided
        x = scheduler.step(prediction, t, x, **_chance(scheduler, generator)).prev_sample
    return x


def shortened(guided: Tensor, plain: Tensor, limit: float) -> Tensor:
    """`guided` (B, C, h, w), each sample at most `limit` times as long as the same one of `plain`."""
    lengths = [x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (guided, plain)]
    return guided * (limit * lengths[1] / lengths[0]).clamp(max=1)


def _chance(scheduler: Any, generator: Generator | list[Generator]) -> dict[str, Generator | list[Generator]]:
    """Only some schedulers draw noise on the way."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if takes else {}


@torch.no_grad()
def conditioning(
    model: Family,
    captions: list[str],
    sizes: Sizes,
    guidance: float | None,
    *,
    weighted: bool = False,
    negative: bool = False,
    frozen: FrozenText | None = None,
    live: frozenset[str] = frozenset(),
) -> Tensors:
    """What the denoiser gets of the captions; `weighted`: (words) and [words] count more and less.

    With `frozen`, the features of all encoders but the `live` ones come from what it remembers.
    """
    features: dict[str, Tensors] = {}
    for part in model.text_parts:
        if frozen is None or part in live:
            found = live_text(model, part, captions, weighted=weighted, negative=negative)
        else:
            found = frozen.encode(part, captions, weighted=weighted, negative=negative)
        features[part] = {name: tensor.to(model.device) for name, tensor in found.items()}
    return model.condition(features, sizes, guidance)


def together(found: Sequence[tuple[Picture, T]], size: int) -> Iterator[list[tuple[Picture, T]]]:
    """At most `size` at a time of those that can be made together; the first comes first."""
    ways: dict[Picture, list[tuple[Picture, T]]] = {}
    for picture, more in found:
        ways.setdefault(picture.way, []).append((picture, more))
    for group in ways.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def generate(model: Family, method: Draws, picture: Picture, frozen: FrozenText | None = None) -> Tensor:
    """One image (3, H, W) in [-1, 1], float32 on the CPU; a function of the picture and the weights alone.

    frozen: remembers what encoders that do not train say to a prompt, and may know it from before they were put away.
    """
    return generate_together(model, method, [picture], frozen)[0]


@torch.no_grad()
def generate_together(
    model: Family, method: Draws, pictures: Sequence[Picture], frozen: FrozenText | None = None
) -> list[Tensor]:
    """The images of pictures with one `way`, each as `generate` makes it alone, up to rounding."""
    usual, count = pictures[0], len(pictures)
    assert all(picture.way == usual.way for picture in pictures)
    generators = [Generator().manual_seed(picture.seed) for picture in pictures]
    spec = model.latents
    shape = (spec.channels, usual.height // spec.downscale, usual.width // spec.downscale)
    extras, sizes = Extras(), Sizes.plain(count, usual.height, usual.width)
    method.begin(model, extras)

    def read(texts: list[str], *, negative: bool) -> Tensors:
        return conditioning(
            model, [method.caption(text) for text in texts], sizes, usual.guidance,
            weighted=usual.weighted, negative=negative, frozen=frozen, live=method.live_text,
        )  # fmt: skip

    positive = read([picture.prompt for picture in pictures], negative=False)
    negative = read([picture.negative_prompt for picture in pictures], negative=True) if usual.guided else None
    x = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(model.device)
    scheduler = make_scheduler(usual.sampler, model.objective)
    clean = denoise(
        model, method, scheduler, x, positive, negative,
        steps=usual.steps, scale=usual.scale, extras=extras, generator=generators,
        cfg_trunc_ratio=usual.cfg_trunc_ratio, renorm_cfg=usual.renorm_cfg, flow_shift=usual.flow_shift,
    )  # fmt: skip
    return list(decode_latents(model, clean).cpu().clamp(-1, 1))
