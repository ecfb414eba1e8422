"""The model on its device, prepared by the method, and what its loss depends on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfumato.config.prompts import read_prompts
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import make_recipe
from sfumato.diffusion.uncertainty import Uncertainty
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders
from sfumato.loss import LossContext
from sfumato.memory.checkpointing import checkpoint_blocks
from sfumato.memory.host import keep_freed_memory
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.optim.bf16_stepper import keep_in_bfloat16
from sfumato.optim.groups import ParameterGroup
from sfumato.plan import RunPlan


def load_model(plan: RunPlan, device: torch.device) -> tuple[Family, Sequence[ParameterGroup]]:
    """Load every network, let the method prepare the model; gives the model and what trains."""
    config = plan.config
    if device.type == "cpu":
        keep_freed_memory()
    trained_dtype = torch.bfloat16 if config.memory.full_bf16 else torch.float32
    blueprint = plan.blueprint.with_dtype(plan.method.full_precision_parts(plan.blueprint), trained_dtype)
    dtype = MIXED_PRECISION[config.memory.mixed_precision]
    model = plan.family.load(blueprint, config.model, dtype=dtype, device=device)
    model.set_resolutions(dataset.settings.resolution for dataset in plan.data.datasets)
    groups = plan.method.prepare(model)
    if config.memory.full_bf16:
        keep_in_bfloat16(groups)
    if config.memory.gradient_checkpointing:
        for part in model.parts.values():
            checkpoint_blocks(part.module, part.spec.blocks)
    return model, groups


def make_loss_context(
    plan: RunPlan, model: Family, uncertainty: Uncertainty | None, device: torch.device
) -> LossContext:
    """What training and validation share; prompts of previews are encoded while every encoder is on the device."""
    config = plan.config
    text = FrozenTextEncoders(model, weighted=config.captions.weighted_captions)
    if config.cache.cache_text_encoder_outputs:
        encode_preview_prompts(plan, text)
    return LossContext(
        model=model,
        method=plan.method,
        recipe=make_recipe(config.noise, config.loss, model.objective, config.model.guidance_scale, uncertainty),
        randomness=Randomness(plan.seed),
        text=text,
        device=device,
        mixed_dtype=MIXED_PRECISION[config.memory.mixed_precision],
    )


def encode_preview_prompts(plan: RunPlan, text: FrozenTextEncoders) -> None:
    """Remember the prompts' features of every encoder that is about to leave the device."""
    samples, method = plan.config.samples, plan.method
    prompts = read_prompts(samples.sample_prompts) if samples.sample_prompts else ()
    for prompt in prompts:
        for words, negative in ((prompt.prompt, False), (prompt.negative_prompt, True)):
            for part in set(text.model.text_parts) - method.live_text:
                text.encode(part, [method.rewrite_caption(words)], weighted=samples.prompt_weighting, negative=negative)
