"""Options of how long training runs and where it starts."""

from __future__ import annotations

from sfumato.config.base import Options, option


class LoopOptions(Options):
    """Length of training"""

    max_train_steps: int = option(1600, "optimizer steps", ge=1)
    max_train_epochs: int | None = option(None, "epochs; takes the place of --max_train_steps", ge=1)
    gradient_accumulation_steps: int = option(1, "batches whose gradients make one step", ge=1)
    max_bad_steps: int = option(5, "steps in a row that may give nothing finite before training stops", ge=1)
    seed: int | None = option(None, "seed of everything random; without it drawn and reported")
    initial_epoch: int | None = option(
        None, "epoch that training begins with, counted from 1: what comes before is called done", ge=1
    )
    initial_step: int | None = option(
        None, "step after which training begins; goes before --initial_epoch, and before the state's own step", ge=0
    )
    skip_until_initial_step: bool = option(
        False, "leave out the data of the steps before it; without this only the steps' names change"
    )
