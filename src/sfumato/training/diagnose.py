"""Why a step gave something that is not finite: which images, at which timesteps, and in which module it began."""

from __future__ import annotations

from pathlib import PurePath

import torch
from torch import nn

from sfumato.common.text import list_some
from sfumato.data.loader import Step
from sfumato.loss import training_loss
from sfumato.training.latents import check_latents, load_latents, load_other_images
from sfumato.training.nonfinite import (
    check_finite_weights,
    find_nonfinite_group,
    list_nonfinite_gradients,
    record_nonfinite_outputs,
)
from sfumato.training.run import Run

MOST_NAMES = 4


def diagnose_nonfinite(run: Run, step: Step) -> str:
    """Compute the step's loss and gradients again and look at every module's output. Gradients are lost.

    The weights are those after the step that followed it. UserError where these are not finite, which no further step
    can change, or where the latents are not.
    """
    check_finite_weights(run.parallel.exchange(find_nonfinite_group(run.optimizer)), run.step)
    networks: dict[str, nn.Module] = {"method": run.method.modules}
    networks |= {name: part.module for name, part in run.model.parts.items()}
    facts = [f"{name_images(run, step)} at t = {name_timesteps(run, step)}"]
    if not run.optimization.owner.keeps_gradients:  # nor can the step be repeated outside of its engine
        return facts[0]
    run.optimization.owner.forget_gradients()
    with record_nonfinite_outputs(networks) as modules:
        repeat_step(run, step)
    own = list_nonfinite_gradients(networks, run.parallel.own_values)
    gradients = [name for names in run.parallel.exchange(own[:1]) for name in names]
    run.optimization.owner.forget_gradients()
    if modules:
        facts.append(f"the first module with such an output is {modules[0]}")
    elif gradients:
        facts.append(f"the loss is finite, the gradient of {gradients[0]} is not")
    return "; ".join(facts)


def repeat_step(run: Run, step: Step) -> None:
    """Forward and backward of a step, with the same random numbers; not compiled, since hooks would be, too."""
    with torch.compiler.set_stance("force_eager"):
        for micro_step, batch in enumerate(step.batches):
            run.context.randomness.seed_modules(step.index, micro_step, run.parallel.rank)
            latents = load_latents(run, batch)
            check_latents(latents, batch, run.loader)
            with run.autocast():
                loss = training_loss(run.context, load_other_images(run, batch), latents, step.real_samples)
            run.scaler.scale(loss).backward()


def name_images(run: Run, step: Step) -> str:
    """File names of this process's images."""
    planned = next(run.loader.sampler.steps(step.index))
    names: list[str] = []
    for batch in planned.batches:
        names += [PurePath(sample.item.image.path).name for sample in batch.samples]
    return list_some(names, MOST_NAMES)


def name_timesteps(run: Run, step: Step) -> str:
    """The first timesteps of the first micro-batches, as whole numbers."""
    context, names = run.context, []
    for batch in step.batches[:MOST_NAMES]:
        shape = load_latents(run, batch).shape[1:]
        t = context.recipe.timesteps(context.randomness, batch.ids, shape, context.model.latents, batch.timestep_offset)
        names += [f"{value:.0f}" for value in t.tolist()[:MOST_NAMES]]
    return ", ".join(names)
