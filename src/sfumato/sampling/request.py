"""What one image depends on besides the model, from a prompt and the defaults of its family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from sfumato.config.prompts import Prompt
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.deep_shrink import DeepShrink
from sfumato.sampling.schedulers import has_zero_offset
from sfumato.sampling.settings import (
    ControlSettings,
    FirstNoise,
    GradualLatent,
    HighresFix,
    RegionSettings,
    SizeInputs,
    StartImage,
    given_values,
    read_settings,
)

_T = TypeVar("_T")
GROWING_SAMPLER = "euler_a"


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
    control_image: str = ""  # the file of a control image, of the first where there are several
    control_mask: str = ""  # the file of a mask, for an LLLite that reads one beside it
    control: ControlSettings = field(default_factory=ControlSettings)
    first_noise: FirstNoise = field(default_factory=FirstNoise)
    force_scheduler_zero_steps_offset: bool = False  # the time grid is that of a scheduler whose steps_offset is 0
    weighted: bool = True  # whether (words) and [words] have more and less weight
    prompt_2: str | None = None  # what the second text encoder reads instead
    clip_prompt: str | None = None  # what the pooled vector is made of instead
    negative_scale: float | None = None  # strength of the negative prompt alone; None: that of the guidance
    multipliers: tuple[float, ...] = ()  # of the adapters, in their order; empty: their own
    start: StartImage | None = None
    regions: RegionSettings | None = None
    sizes: SizeInputs = field(default_factory=SizeInputs)
    shrink: DeepShrink | None = None
    growth: GradualLatent | None = None
    highres: HighresFix | None = None

    @property
    def settings(self) -> list[Any]:
        """The settings that only some images have, of this one."""
        every = (
            self.start, self.regions, self.sizes, self.shrink, self.growth, self.highres, self.control, self.first_noise
        )  # fmt: skip
        return [settings for settings in every if settings is not None]

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs; at scale 1 the negative prompt has no effect."""
        return self.scale != 1.0

    @property
    def batch_key(self) -> ImageRequest:
        """Everything but prompts and seed: requests with the same key can be generated in one batch."""
        texts = {"prompt": "", "negative_prompt": "", "prompt_2": None, "clip_prompt": None}
        return replace(self, **texts, seed=0, multipliers=(1.0,) if self.multipliers else ())

    @property
    def texts(self) -> list[tuple[str, bool]]:
        """All that text encoders read, and whether it is a negative prompt."""
        further = [text for text in (self.prompt_2, self.clip_prompt) if text is not None]
        negative = [self.negative_prompt] if self.guided else []
        negative += [""] if self.guided and self.negative_scale is not None else []
        prompts = [self.prompt] if self.regions is None else self.regions.parts
        return [*((text, False) for text in (*prompts, *further)), *((text, True) for text in negative)]

    def text_for(self, model: Family, part: str) -> str:
        """What a text encoder reads."""
        is_second = len(model.text_parts) > 1 and part == model.text_parts[1]
        return self.prompt_2 if is_second and self.prompt_2 is not None else self.prompt

    def pooled_text(self, model: Family, part: str) -> str:
        """What its pooled vector is made of."""
        return self.text_for(model, part) if self.clip_prompt is None else self.clip_prompt


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
        scale=_choose(prompt.scale, defaults.scale),
        guidance=None if defaults.guidance is None else _choose(prompt.guidance_scale, defaults.guidance),
        sampler=prompt.sample_sampler or sampler,
        cfg_trunc_ratio=_choose(prompt.cfg_trunc_ratio, defaults.cfg_trunc_ratio),
        renorm_cfg=_choose(prompt.renorm_cfg, defaults.renorm_cfg),
        flow_shift=prompt.flow_shift if _takes_shift(prompt, model) else None,
        reference_image=(prompt.reference_image or "") if model.num_references else "",
        control_image=(prompt.controlnet_image or "") if model.takes_control else "",
        control_mask=(prompt.mask_image or "") if prompt.controlnet_image and model.takes_control_mask else "",
        control=read_settings(ControlSettings, prompt) if model.takes_control else ControlSettings(),
        first_noise=read_settings(FirstNoise, prompt),
        force_scheduler_zero_steps_offset=prompt.force_scheduler_zero_steps_offset or False,
        weighted=weighted,
        prompt_2=prompt.prompt_2 if len(model.text_parts) > 1 else None,
        clip_prompt=prompt.clip_prompt if model.has_pooled_text else None,
        negative_scale=prompt.negative_scale,
        multipliers=prompt.network_mul,
        start=read_start(prompt, model) if prompt.init_image else None,
        regions=read_regions(prompt),
        sizes=read_settings(SizeInputs, prompt) if model.has_size_inputs else SizeInputs(),
        shrink=choose_shrink(prompt, model),
        growth=choose_growth(prompt, model, prompt.sample_sampler or sampler),
        highres=read_settings(HighresFix, prompt) if prompt.highres_fix_scale else None,
    )


def _choose(value: float | None, default: float) -> float:
    return default if value is None else value


def choose_growth(prompt: Prompt, model: Family, sampler: str) -> GradualLatent | None:
    """UserError where the sampler has no step in which latents can grow."""
    if not given_values(GradualLatent, prompt) or "sample_sampler" not in model.options:
        return None
    if sampler.removeprefix("k_") != GROWING_SAMPLER:
        raise UserError(
            f"the prompt {prompt.prompt[:40]!r}: a gradual latent needs the sampler {GROWING_SAMPLER}, not {sampler}",
            code="gradual-latent-sampler",
            fix=f"--sampler {GROWING_SAMPLER}, or --ss {GROWING_SAMPLER} in the prompt",
        )
    if model.blueprint.inpaints or (prompt.controlnet_image and model.takes_control):
        raise UserError(
            f"the prompt {prompt.prompt[:40]!r}: a gradual latent cannot be combined with a control image or with a "
            "model for inpainting, whose other images have the full size",
            code="gradual-latent-with-images",
            fix="remove the gradual latent, or the control image",
        )
    return read_settings(GradualLatent, prompt)


def choose_shrink(prompt: Prompt, model: Family) -> DeepShrink | None:
    """UserError beside a control image, which steers features of the full size."""
    if not given_values(DeepShrink, prompt) or not model.has_deep_shrink:
        return None
    if prompt.controlnet_image and model.takes_control:
        raise UserError(
            f"the prompt {prompt.prompt[:40]!r}: Deep Shrink cannot be combined with a control image",
            code="deep-shrink-with-control-image",
            fix="remove one of them",
        )
    return read_settings(DeepShrink, prompt)


def list_ignored(prompt: Prompt, request: ImageRequest, model: Family) -> Iterator[str]:
    """Options of the prompt that are ignored on this model, and sizes that were changed."""
    start = f"the prompt {prompt.prompt[:40]!r}: "
    if not request.guided:
        given = {"the negative prompt": prompt.negative_prompt, "--ctr": prompt.cfg_trunc_ratio}
        given |= {"--rcfg": prompt.renorm_cfg, "--nl": prompt.negative_scale}
        for name in (name for name, value in given.items() if value):
            yield f"{start}{name} has no effect, because classifier-free guidance is off; --l above 1 turns it on"
    if prompt.guidance_scale and model.sampling.guidance is None:
        yield f"{start}--g has no effect, this model has no embedded guidance; classifier-free guidance is --l"
    if request.force_scheduler_zero_steps_offset and not has_zero_offset(request.sampler, model.objective):
        yield f"{start}--force_scheduler_zero_steps_offset has no effect on this model's time grid with this sampler"
    if prompt.sample_sampler and "sample_sampler" not in model.options:
        yield f"{start}--ss is ignored: flow models always use Euler"
    if prompt.controlnet_image and not model.takes_control:
        yield f"{start}--cn has no effect, there is no ControlNet"
    elif given_values(ControlSettings, prompt) and not prompt.controlnet_image:
        yield f"{start}--control_net_... has no effect without a control image, --cn FILE"
    if model.takes_control and not prompt.controlnet_image:
        yield f"{start}it has no control image (--cn FILE), so the ControlNet takes no part"
    elif model.takes_control_mask and not prompt.mask_image:
        yield f"{start}it has no mask (--mk FILE), so the LLLite that reads one takes no part"
    if prompt.reference_image and not model.num_references:
        yield f"{start}--ref has no effect, this model takes no reference images"
    if prompt.flow_shift is not None and not _takes_shift(prompt, model):
        yield f"{start}--fs has no effect on this model, whose steps have no such shift"
    yield from (f"{start}{line}" for line in list_unsupported(prompt, model))
    multiple = model.sampling.size_multiple
    for name in ("width", "height"):
        requested, used = vars(prompt)[name], vars(request)[name]
        if requested not in (None, used):
            yield f"{start}the {name} {requested} becomes {used}, a multiple of {multiple}"


def list_unsupported(prompt: Prompt, model: Family) -> Iterator[str]:
    """Settings that this model has no use for."""
    if prompt.prompt_2 is not None and len(model.text_parts) < 2:
        yield "--p2 has no effect, this model has one text encoder"
    if prompt.clip_prompt is not None and not model.has_pooled_text:
        yield "--c has no effect, this model takes no pooled vector of a text"
    if given_values(SizeInputs, prompt) and not model.has_size_inputs:
        yield "--ow, --oh, --nw, --nh, --ct and --cl have no effect, this model gets no sizes"
    if given_values(DeepShrink, prompt) and not model.has_deep_shrink:
        yield "Deep Shrink has no effect, this model is no UNet"
    if given_values(GradualLatent, prompt) and "sample_sampler" not in model.options:
        yield f"Gradual Latent has no effect, flow models have no sampler {GROWING_SAMPLER}"
    if given_values(GradualLatent, prompt) and prompt.init_image:
        yield "Gradual Latent has no effect on an image that starts from another"
    if prompt.strength is not None and not (prompt.init_image or prompt.highres_fix_scale):
        yield "--t has no effect without an image to start from, --img FILE"
    reads_mask = prompt.controlnet_image and model.takes_control_mask
    if prompt.mask_image and not prompt.init_image and len(prompt.parts) < 2 and not reads_mask:
        yield "--mk has no effect without an image to start from, --img FILE"
    yield from list_unused_vision(prompt, model)
    if prompt.network_regional_mask_max_color_codes and not (prompt.mask_image and len(prompt.parts) > 1):
        yield "--network_regional_mask_max_color_codes has no effect without parts (a AND b) and --mask_path FILE"
    yield from list_unused_highres(prompt)


def list_unused_vision(prompt: Prompt, model: Family) -> Iterator[str]:
    """What is said of an image's vector where there is no image, or no place for it."""
    if prompt.clip_vision_strength is None and prompt.clip_vision_model:
        yield "--clip_vision_model has no effect without --clip_vision_strength"
    elif prompt.clip_vision_strength is not None and not prompt.init_image:
        yield "--clip_vision_strength has no effect without an image to start from, --img FILE"
    elif prompt.clip_vision_strength is not None and not model.has_pooled_text:
        yield "--clip_vision_strength has no effect, this model takes no pooled vector of a text"


def list_unused_highres(prompt: Prompt) -> Iterator[str]:
    """What is said of two stages where there is one, or no image, or another way to enlarge it."""
    given = [name for name, value in vars(prompt).items() if name.startswith("highres_fix_") and value]
    if not prompt.highres_fix_scale:
        yield from (f"--{name} has no effect without --highres_fix_scale" for name in given)
        return
    if prompt.highres_fix_strength is not None and not prompt.init_image:
        yield "--highres_fix_strength has no effect without an image to start from, --img FILE"
    if prompt.highres_fix_upscaler and prompt.highres_fix_latents_upscaling:
        yield "--highres_fix_upscaler has no effect, because --highres_fix_latents_upscaling enlarges the latents"
    if prompt.highres_fix_disable_control_net and not prompt.controlnet_image:
        yield "--highres_fix_disable_control_net has no effect without a control image, --cn FILE"


def read_start(prompt: Prompt, model: Family) -> StartImage:
    """A model for inpainting starts from noise unless the prompt says otherwise."""
    start = read_settings(StartImage, prompt)
    if len(prompt.parts) > 1:
        start = replace(start, mask_image="")
    if not model.has_pooled_text or start.clip_vision_strength is None:
        start = replace(start, clip_vision_strength=None, clip_vision_model=None)
    return replace(start, strength=1.0) if model.blueprint.inpaints and prompt.strength is None else start


def read_regions(prompt: Prompt) -> RegionSettings | None:
    """Where there are several parts a mask says where they are, not what may change."""
    if len(prompt.parts) < 2:
        return None
    return RegionSettings(
        parts=prompt.parts,
        region_mask=prompt.mask_image or "",
        network_regional_mask_max_color_codes=prompt.network_regional_mask_max_color_codes,
    )


def _takes_shift(prompt: Prompt, model: Family) -> bool:
    return prompt.flow_shift is not None and model.objective.with_shift(prompt.flow_shift) is not None


def group_requests(requests: Sequence[tuple[ImageRequest, _T]], size: int) -> Iterator[list[tuple[ImageRequest, _T]]]:
    """Batches of at most `size` requests with the same key, in order."""
    groups: dict[ImageRequest, list[tuple[ImageRequest, _T]]] = {}
    for request, extra in requests:
        groups.setdefault(request.batch_key, []).append((request, extra))
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))
