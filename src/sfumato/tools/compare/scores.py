"""Scores of a checkpoint's images, as closed formulas over vectors of length 1, whose products are cosines.

All of them are made of similarities between images, of which those of real images among each other, and of the images
of the model before training, give the scale: 0 is the model before training, or no harm, 1 is all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-3  # difference of cosines below which nothing can be told apart


@dataclass(frozen=True, kw_only=True)
class References:
    """The vectors that every checkpoint is compared with. training, held_out: (N, D), without rows where there are
    none. base: (P, S, D) of the prompts about the concept by the model before training, a row for each seed.
    base_neutral: the same for the neutral prompts.
    """

    training: Tensor
    held_out: Tensor
    base: Tensor
    base_neutral: Tensor

    @property
    def real(self) -> Tensor:
        """What images are to be like: those held out, where there are any, since none can be learned by heart."""
        return self.held_out if len(self.held_out) else self.training


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one checkpoint; nan where something is missing. Each tensor has a value for each image."""

    to_training: Tensor  # cosine to the training images, the mean over these
    to_held_out: Tensor
    nearest: Tensor  # 1 - cosine to the nearest training image
    nearest_index: Tensor  # which one that is
    learned: Tensor
    copied: Tensor  # 1 where it is nearer to a training image than any other of these
    usual_copies: float  # the share that new real images would have
    drift: Tensor

    @property
    def memorized(self) -> float:
        """How far the share of copies is above that of new real images, 0 .. 1; nan where that is not known."""
        if not self.usual_copies < 1:
            return math.nan
        return max(0.0, (float(self.copied.mean()) - self.usual_copies) / (1 - self.usual_copies))


def measure_scores(concept: Tensor, neutral: Tensor, references: References) -> Scores:
    """concept, neutral: (P, S, D) of the prompts about the concept and of those that are not."""
    images = concept.flatten(0, 1)
    distances, index = find_nearest_image(images, references.training)
    return Scores(
        to_training=mean_similarity(images, references.training),
        to_held_out=mean_similarity(images, references.held_out),
        nearest=distances,
        nearest_index=index,
        learned=measure_learned(images, references),
        copied=find_copies(images, references.training),
        usual_copies=measure_usual_copies(references.training),
        drift=measure_drift(neutral, references.base_neutral),
    )


def mean_similarity(images: Tensor, others: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N,), the mean cosine to all others, as DreamBooth measures fidelity (Ruiz et al. 2022,
    sec. 4.2); nan without any.
    """
    return (images @ others.T).mean(1) if len(others) else images.new_full((len(images),), math.nan)


def mean_similarity_among(images: Tensor) -> float:
    """The mean cosine of (N, D) to each other, not to themselves; nan for a single one."""
    count = len(images)
    if count < 2:
        return math.nan
    products = images @ images.T
    return float((products.sum() - products.diagonal().sum()) / (count * (count - 1)))


def find_nearest_image(images: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D), (M, D) -> (N,) 1 - the cosine to the nearest one, (N,) which that is; nan and -1 without any."""
    if not len(training):
        return images.new_full((len(images),), math.nan), torch.full((len(images),), -1)
    best, index = (images @ training.T).max(1)
    return 1 - best, index


def measure_learned(images: Tensor, references: References) -> Tensor:
    """(N, D) -> (N,): (s - b) / (r - b), with s the similarity of an image to real ones, b that of images before
    training, and r that of real images among each other; nan where r is not above b.

    0: like the images before training, 1: as much like the real ones as these are like each other.
    """
    real = references.real
    before = float(mean_similarity(references.base.flatten(0, 1), real).mean()) if len(real) else math.nan
    if len(references.held_out):
        among = float(mean_similarity(references.held_out, references.training).mean())
    else:
        among = mean_similarity_among(real)
    if not among - before >= SMALLEST_SCALE:  # also nan
        return images.new_full((len(images),), math.nan)
    return (mean_similarity(images, real) - before) / (among - before)


def find_copies(images: Tensor, training: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N,): 1 where an image is nearer to its nearest training image than any other training image
    is to that one, else 0 (Alaa et al. 2022, "How faithful is your synthetic data?", sec. 4.3).

    nan for fewer than two training images.
    """
    if len(training) < 2:
        return images.new_full((len(images),), math.nan)
    among = training @ training.T
    own = 1 - among.fill_diagonal_(-math.inf).max(1).values
    distances, index = find_nearest_image(images, training)
    return (distances < own[index]).to(images.dtype)


def measure_usual_copies(training: Tensor) -> float:
    """The share of copies among new real images, as each training image has it against all others: it is one where it
    is also the nearest to the one that is nearest to it. nan for fewer than three.
    """
    if len(training) < 3:
        return math.nan
    nearest = (training @ training.T).fill_diagonal_(-math.inf).argmax(1)
    return float((nearest[nearest] == torch.arange(len(training))).double().mean())


def measure_drift(images: Tensor, base: Tensor) -> Tensor:
    """(P, S, D) and the same of the model before training -> (P * S,): (a - s) / (a - u), with s the similarity of an
    image to those that the model made of its prompt with other seeds before training, a that of these among each
    other, and u that of the ones of different prompts.

    0: it shows the prompt as before, 1: no more than another prompt's image does. nan with fewer than two seeds or two
    prompts.
    """
    prompts, seeds = base.shape[:2]
    nothing = images.new_full((prompts * seeds,), math.nan)
    if prompts < 2 or seeds < 2:
        return nothing
    same_prompt = torch.eye(prompts, dtype=torch.bool, device=base.device).repeat_interleave(seeds, 0)
    same_prompt = same_prompt.repeat_interleave(seeds, 1)
    itself = torch.eye(prompts * seeds, dtype=torch.bool, device=base.device)
    flat = base.flatten(0, 1)
    among_base = flat @ flat.T
    usual = float(among_base[same_prompt & ~itself].mean())
    unrelated = float(among_base[~same_prompt].mean())
    if not usual - unrelated >= SMALLEST_SCALE:
        return nothing
    to_base = (images.flatten(0, 1) @ flat.T).masked_fill(~(same_prompt & ~itself), 0).sum(1) / (seeds - 1)
    return (usual - to_base) / (usual - unrelated)


def measure_pixel_change(image: Tensor, base: Tensor) -> float:
    """Two images (3, H, W) in [0, 1] of one seed -> the root mean square of their difference. It needs no encoder."""
    return float((image - base).square().mean().sqrt())
