"""Why a step gave something that is not finite: which pictures, at which timesteps, and where it began."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePath

import torch
from torch import Tensor, nn

from sfumato.data.batch import Batch
from sfumato.data.loader import Step
from sfumato.training.nonfinite import bad_gradients, first_bad_module
from sfumato.training.run import Run

MOST_NAMES = 4


def explain(run: Run, step: Step, loss: Callable[[Run, Batch, int], Tensor]) -> str:
    """Go through the step's pictures again, with an eye on every module. Its gradients are lost afterwards."""
    networks = networks_of(run)
    gradients = bad_gradients(networks)
    run.optimizer.zero_grad(set_to_none=True)
    found = [f"{names_of(run, step)} at t = {timesteps_of(run, step)}"]
    with first_bad_module(networks) as modules, torch.no_grad():
        for micro, batch in enumerate(step.batches):
            run.randomness.seed_modules(step.index, micro, run.processes.process_index)
            with run.autocast():
                loss(run, batch, step.real_samples)
    if modules:
        found.append(f"the first module with such an output is {modules[0]}")
    elif gradients:
        found.append(f"the loss is finite, the gradient of {gradients[0]} is not")
    return "; ".join(found)


def networks_of(run: Run) -> dict[str, nn.Module]:
    return {"method": run.method.modules, **{name: part.module for name, part in run.model.parts.items()}}


def names_of(run: Run, step: Step) -> str:
    """Names of the picture files of this process."""
    planned = next(run.loader.order.steps(step.index))
    names = [PurePath(sample.item.picture.path).name for batch in planned.batches for sample in batch.samples]
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def timesteps_of(run: Run, step: Step) -> str:
    values = [
        run.recipe.timesteps(run.randomness, batch.ids, run.latents(batch).shape[1:], run.model.latents)
        for batch in step.batches
    ]
    return ", ".join(f"{t:.0f}" for t in _flat(values[:MOST_NAMES]))


def _flat(values: list[Tensor]) -> Iterator[float]:
    for each in values:
        yield from each.tolist()[:MOST_NAMES]
