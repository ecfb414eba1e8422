"""The model: opened, its networks loaded when they are needed, prepared by the method; and what its loss depends on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from sfumato.config import Config
from sfumato.config.prompts import read_prompts
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import make_recipe
from sfumato.diffusion.uncertainty import Uncertainty
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders
from sfumato.loss import LossContext
from sfumato.memory.blocks import wrap_blocks
from sfumato.memory.host import keep_freed_memory
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.optim.bf16_stepper import keep_in_bfloat16
from sfumato.optim.groups import ParameterGroup
from sfumato.plan import RunPlan
from sfumato.training.caching import PreviewPrompts


def open_model(plan: RunPlan, device: torch.device) -> Family:
    """The model on its device, of which no weight is read yet."""
    config = plan.config
    if device.type == "cpu":
        keep_freed_memory()
    trained_dtype = torch.bfloat16 if config.memory.full_bf16 else torch.float32
    blueprint = plan.blueprint.with_dtype(plan.method.full_precision_parts(plan.blueprint), trained_dtype)
    model = plan.family(blueprint, config.model, dtype=MIXED_PRECISION[config.memory.mixed_precision], device=device)
    model.set_resolutions(dataset.settings.resolution for dataset in plan.data.datasets)
    plan.method.change_frozen(model)
    return model


def read_preview_prompts(plan: RunPlan, model: Family) -> PreviewPrompts:
    """What previews will have encoded, with the features that are known so far: none."""
    return make_preview_prompts(plan.config, model, plan.method.rewrite_caption)


def make_preview_prompts(config: Config, model: Family, rewrite: Callable[[str], str] = str) -> PreviewPrompts:
    """The same for any run with this model. rewrite: the method's change of a prompt before encoding."""
    path = config.samples.sample_prompts
    captions: list[tuple[str, bool]] = []
    for prompt in read_prompts(path) if path else ():
        captions += [(rewrite(prompt.prompt), False), (rewrite(prompt.negative_prompt), True)]
    text = FrozenTextEncoders(model, weighted=config.captions.weighted_captions)
    return PreviewPrompts(text=text, captions=captions, weighted=config.samples.prompt_weighting)


def load_networks(plan: RunPlan, model: Family, *, cached: Collection[str]) -> Sequence[ParameterGroup]:
    """Load the networks that the steps run, all but the `cached` ones, and let the method prepare them: what trains."""
    config = plan.config
    needed = [part for name, part in model.parts.items() if name not in cached]
    for part in needed:
        part.load()
    groups = plan.method.prepare(model)
    if config.memory.full_bf16:
        keep_in_bfloat16(groups)
    for part in needed:
        wrap_blocks(part.module, part.spec.blocks, config.memory)
    return groups


def make_loss_context(plan: RunPlan, text: FrozenTextEncoders, uncertainty: Uncertainty | None) -> LossContext:
    """What training and validation share."""
    config, model = plan.config, text.model
    return LossContext(
        model=model,
        method=plan.method,
        recipe=make_recipe(config.noise, config.loss, model.objective, config.model.guidance_scale, uncertainty),
        randomness=Randomness(plan.seed),
        text=text,
        device=model.device,
        mixed_dtype=MIXED_PRECISION[config.memory.mixed_precision],
    )
