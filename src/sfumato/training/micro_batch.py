"""The loss of one micro-batch, whose images may have to be encoded first."""

from __future__ import annotations

from torch import Tensor

from sfumato.data.batch import Batch
from sfumato.loss import SampleLosses, training_loss
from sfumato.training.latents import load_latents, load_other_images
from sfumato.training.run import Run


def compute_loss(run: Run, batch: Batch, real_samples: int, samples: list[SampleLosses]) -> Tensor:
    """0-d, divided by the real samples of the step. samples: those of this micro-batch are added to it."""
    return training_loss(run.context, load_other_images(run, batch), load_latents(run, batch), real_samples, samples)
