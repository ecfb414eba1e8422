"""What one image depends on besides the model, from a prompt and the defaults of its family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sfumato.config.prompts import Prompt
from sfumato.families.base import Family

_T = TypeVar("_T")


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


def group_requests(requests: Sequence[tuple[ImageRequest, _T]], size: int) -> Iterator[list[tuple[ImageRequest, _T]]]:
    """Batches of at most `size` requests with the same key, in order."""
    groups: dict[ImageRequest, list[tuple[ImageRequest, _T]]] = {}
    for request, extra in requests:
        groups.setdefault(request.batch_key, []).append((request, extra))
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))
