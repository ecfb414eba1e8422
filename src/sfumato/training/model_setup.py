"""The model: opened, its networks loaded when they are needed, prepared by the method; and what its loss depends on."""

from __future__ import annotations

from collections.abc import Collection

import torch

from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import make_recipe
from sfumato.diffusion.uncertainty import Uncertainty
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders
from sfumato.loss import LossContext
from sfumato.memory.host import keep_freed_memory
from sfumato.memory.low_precision import choose_formats
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.methods.model_plan import ModelPlan
from sfumato.optim.half_stepper import keep_in_half
from sfumato.parallel.base import ParallelStrategy
from sfumato.plan import RunPlan
from sfumato.training.block_setup import PreparedNetworks, choose_hosted_parts, prepare_blocks
from sfumato.training.goals import make_goal


def open_model(plan: RunPlan, device: torch.device) -> Family:
    """The model on its device, of which no weight is read yet, ready for the data's resolutions."""
    if device.type == "cpu":
        keep_freed_memory()
    model = make_model(plan, device)
    model.set_resolutions(dataset.settings.resolution for dataset in plan.data.datasets)
    return model


def make_model(plan: RunPlan | ModelPlan, device: torch.device) -> Family:
    """The model on its device from what is planned for it alone."""
    config = plan.config
    trained_dtype = MIXED_PRECISION[config.memory.trained_precision]
    blueprint = plan.blueprint.with_dtype(plan.method.full_precision_parts(plan.blueprint), trained_dtype)
    model = plan.family(blueprint, config.model, dtype=MIXED_PRECISION[config.memory.mixed_precision], device=device)
    choose_formats(model, config.memory, trained=plan.method.full_precision_parts(plan.blueprint))
    plan.method.change_frozen(model)
    choose_hosted_parts(plan, model)
    return model


def load_networks(
    plan: RunPlan, model: Family, parallel: ParallelStrategy, *, cached: Collection[str]
) -> PreparedNetworks:
    """Load the networks that the steps run, all but the `cached` ones, and let the method prepare them: what trains."""
    config = plan.config
    needed = {name: part for name, part in model.parts.items() if name not in cached}
    for part in needed.values():
        parallel.load(part)
    groups = parallel.own_parameters(plan.method.prepare(model))
    if config.memory.trained_precision != "no":
        keep_in_half(groups, MIXED_PRECISION[config.memory.trained_precision])
    for name, part in needed.items():
        parallel.prepare(name, part.module)
    masks_attention = plan.blueprint.masks_attention
    return prepare_blocks(list(needed.values()), groups, config.memory, masks_attention=masks_attention)


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
        goal=make_goal(config),
    )
