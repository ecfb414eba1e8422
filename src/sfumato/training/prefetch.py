"""The steps of a run with everything that they need on the device, while it still computes the step before."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from sfumato.data.batch import Batch
from sfumato.data.loader import Step
from sfumato.loss import draw_noise
from sfumato.training.run import Run


def prefetch(run: Run, first_step: int) -> Generator[Step, None, None]:
    """The loader's steps from this one on. Its threads draw timesteps and noise, and put all of it into pinned memory.

    Since no step waits for the device, the next one is asked for while the device has a whole one to compute: its
    copies, on a stream of their own, are done long before they are needed.
    """

    def finish(batch: Batch) -> Batch:
        return pin_batch(run, add_draws(run, batch))

    run.outcomes.mark_asked()
    for step in run.loader.steps(first_step, finish):
        with run.outcomes.transfer.sending() as send:
            sent = replace(step, batches=tuple(batch.map_large(send) for batch in step.batches))
        run.outcomes.mark_start()
        yield sent
        run.outcomes.mark_asked()


def add_draws(run: Run, batch: Batch) -> Batch:
    """Where latents are not cached, they are drawn in the step: noise may depend on them."""
    if batch.latents is None:
        return batch
    return replace(batch, draws=draw_noise(run.context, batch, batch.latents))


def pin_batch(run: Run, batch: Batch) -> Batch:
    pin = run.outcomes.transfer.pin
    mask = None if batch.mask is None else pin(batch.mask)  # copied in the step: the host looks at it, too
    return replace(batch.map_large(pin), mask=mask)
