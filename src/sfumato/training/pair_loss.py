"""The loss of sliders from pairs of images (Gandikota et al. 2023, "Concept Sliders", sec. 4.2).

Both images of a pair get the same noise at the same time. With the adapter at strength s the model predicts for the one
with more of an attribute, with -s for the one with less; what both have in common pulls the adapter both ways.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.data.batch import Batch, RandomDraws, name_reference
from sfumato.loss import LossContext, draw_noise, sample_losses

LESS = name_reference(0)  # the role of the images with less of the attribute


@dataclass(frozen=True)
class PairGoal:
    """In the place of one noised image: two, as one batch, since hooks must see one strength until backward is over."""

    def draw(self, context: LossContext, batch: Batch, x0: Tensor) -> RandomDraws:
        return draw_noise(context, batch, x0)

    def measure(
        self, context: LossContext, batch: Batch, x0: Tensor, t: Tensor, noise: Tensor, input_noise: Tensor
    ) -> Tensor:
        """(B,) the mean of both images' losses, before weighting."""
        less = batch.extras.images[LESS].latents
        assert less is not None, "they are encoded before the loss"
        both = torch.cat([x0, less.to(x0)])
        losses = sample_losses(
            context, pair_batch(batch), both, *(torch.cat([each, each]) for each in (t, noise, input_noise))
        )
        return losses.unflatten(0, (2, -1)).mean(0)


def pair_batch(batch: Batch) -> Batch:
    """(2B) first the samples with more of the attribute at the strength s of their dataset, then the others at -s."""
    strength = batch.extras.multiplier
    strength = torch.ones(len(batch.captions)) if strength is None else strength
    images = {role: image for role, image in batch.extras.images.items() if role != LESS}
    alone = replace(batch, extras=replace(batch.extras, images=images), draws=None)
    paired = alone.take(torch.arange(len(batch.captions)).repeat(2))
    return replace(paired, extras=replace(paired.extras, multiplier=torch.cat([strength, -strength])))
